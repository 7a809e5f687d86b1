#include "loss_curve.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace winnow::cli {
namespace {

constexpr double kWidth = 720, kHeight = 360;
constexpr double kLeft = 64, kRight = 16, kTop = 36, kBottom = 40;

// Steps of 1, 2 or 5 times a power of ten, four or so to a range.
double NiceStep(double range) {
  const double raw = range / 4, power = std::pow(10, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (raw <= factor * power) return factor * power;
  }
  return 10 * power;
}

}  // namespace

std::string LossCurve(const std::vector<StepRecord>& steps, std::optional<double> held_out_before) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  const auto widen = [&](double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  };
  for (const StepRecord& step : steps) {
    widen(step.loss);
    if (step.held_out) widen(*step.held_out);
  }
  if (held_out_before) widen(*held_out_before);
  if (!(low <= high)) low = high = 0;
  if (high - low < 1e-6) {
    low -= 0.5;
    high += 0.5;
  }
  const double grid = NiceStep(high - low);
  low = std::floor(low / grid) * grid;
  high = std::ceil(high / grid) * grid;
  const auto last = static_cast<double>(std::max<size_t>(2, steps.size()) - 1);
  const auto x = [&](double step) { return kLeft + step / last * (kWidth - kLeft - kRight); };
  const auto y = [&](double loss) {
    return kTop + (high - loss) / (high - low) * (kHeight - kTop - kBottom);
  };
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" "
      "height=\"{1}\" font-family=\"sans-serif\" font-size=\"12\">\n<style>:root{{--ink:#222;"
      "--grid:#ddd;--train:#2563c9;--held:#c2410c;--page:#fff}}@media(prefers-color-scheme:dark){{"
      ":root{{--ink:#ddd;--grid:#444;--train:#7aa7f0;--held:#f59e66;--page:#1b1b1b}}}}"
      "text{{fill:var(--ink)}}</style>\n<rect width=\"{0}\" height=\"{1}\" "
      "fill=\"var(--page)\"/>\n",
      kWidth, kHeight);
  const auto text = [&](double at_x, double at_y, const char* anchor, const std::string& words) {
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text>\n", at_x, at_y,
                       anchor, words);
  };
  for (double value = low; value <= high + grid / 2; value += grid) {
    svg += fmt::format(
        "<path d=\"M{:.1f} {:.1f}H{:.1f}\" stroke=\"var(--grid)\" stroke-width=\"1\"/>\n", kLeft,
        y(value), kWidth - kRight);
    text(kLeft - 8, y(value) + 4, "end", fmt::format("{:.4g}", value));
  }
  text(kLeft, kHeight - 14, "start", "step 1");
  text(kWidth - kRight, kHeight - 14, "end", fmt::format("step {}", steps.size()));
  std::string train, held;
  if (held_out_before) held = fmt::format("{:.1f},{:.1f} ", x(0), y(*held_out_before));
  for (size_t i = 0; i < steps.size(); ++i) {
    const double at = x(static_cast<double>(i));
    train += fmt::format("{:.1f},{:.1f} ", at, y(steps[i].loss));
    if (steps[i].held_out) held += fmt::format("{:.1f},{:.1f} ", at, y(*steps[i].held_out));
  }
  const auto line = [&](const std::string& points, const char* color, const char* width) {
    svg += fmt::format(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"var(--{})\" "
        "stroke-width=\"{}\"/>\n",
        points, color, width);
  };
  line(train, "train", "1.5");
  text(kLeft, 20, "start", "loss of each step");
  if (!held.empty()) {
    line(held, "held", "2.5");
    svg += fmt::format("<path d=\"M{} 16h24\" stroke=\"var(--held)\" stroke-width=\"2.5\"/>\n",
                       kLeft + 150);
    text(kLeft + 182, 20, "start", "held-out rows");
  }
  svg += fmt::format("<path d=\"M{} 16h24\" stroke=\"var(--train)\" stroke-width=\"1.5\"/>\n",
                     kLeft + 104);
  return svg + "</svg>\n";
}

}  // namespace winnow::cli
