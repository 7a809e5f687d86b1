// winnow bench: how fast a model runs here, beside what the machine could do in the same minute.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>

#include "base/error.h"
#include "base/memory.h"
#include "base/units.h"
#include "generate/batch_runner.h"
#include "kernels/targets.h"
#include "kernels/throughput.h"
#include "pruning.h"
#include "session.h"

namespace winnow::cli {
namespace {

constexpr size_t kReadBytes = size_t{256} << 20;  // several times any cache this runs on

struct BenchFlags {
  std::string model, plan, format;
  int64_t prompt_tokens = 512, new_tokens = 128, repetitions = 3;
  bool no_skip = false;
};

struct Speed {
  double mean = 0, deviation = 0;
};

Speed Summary(const std::vector<double>& values) {
  Speed speed;
  for (const double value : values) speed.mean += value / static_cast<double>(values.size());
  double squares = 0;
  for (const double value : values) squares += (value - speed.mean) * (value - speed.mean);
  if (values.size() > 1) {
    speed.deviation = std::sqrt(squares / static_cast<double>(values.size() - 1));
  }
  return speed;
}

struct Measured {
  std::vector<double> prompt, decode;             // tokens per second of each repetition
  double read_gigabytes = 0, gemm_gigaflops = 0;  // the best of all repetitions
  double bytes_per_token = 0, experts_per_token = 0;
};

double Since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Measured Measure(Session& session, const Model& model, const BenchFlags& flags,
                 const BatchOptions& options) {
  ThreadPool& pool = session.pool();
  BatchRunner runner(model, options, pool, session.control());
  AlignedBuffer<std::byte> memory(kReadBytes);
  std::fill_n(memory.data(), memory.size(), std::byte{1});
  std::mt19937 random(42);
  const auto id = [&] {
    return static_cast<int32_t>(random() % static_cast<uint32_t>(model.config().vocab_size));
  };
  std::vector<float> logits(static_cast<size_t>(model.config().vocab_size));
  Measured measured;
  // The first round only wakes caches and clocks.
  for (int64_t round = 0; round <= flags.repetitions; ++round) {
    session.control().Poll();
    measured.gemm_gigaflops =
        std::max(measured.gemm_gigaflops, MeasureMatMulGigaFlops(pool, session.compute()));
    std::vector<int32_t> prompt(static_cast<size_t>(flags.prompt_tokens));
    std::generate(prompt.begin(), prompt.end(), id);
    runner.Truncate(0, 0);
    auto start = std::chrono::steady_clock::now();
    for (int64_t first = 0; first < flags.prompt_tokens; first += BatchRunner::kChunkTokens) {
      const int64_t n = std::min(BatchRunner::kChunkTokens, flags.prompt_tokens - first);
      const bool last = first + n == flags.prompt_tokens;
      runner.Prefill(0,
                     std::span(prompt).subspan(static_cast<size_t>(first), static_cast<size_t>(n)),
                     last ? 1 : 0, [](int64_t, std::span<const float>) {});
    }
    if (round > 0 && flags.prompt_tokens > 0) {
      measured.prompt.push_back(static_cast<double>(flags.prompt_tokens) / Since(start));
    }
    runner.Truncate(0, 0);
    measured.read_gigabytes =
        std::max(measured.read_gigabytes, MeasureReadGigabytes(memory.span(), pool));
    const int64_t tokens = round > 0 ? flags.new_tokens : std::min<int64_t>(flags.new_tokens, 8);
    start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < tokens; ++i) {
      const DecodeEntry entry = {0, id()};
      runner.Decode(std::span(&entry, 1), logits);
    }
    if (round > 0 && tokens > 0) {
      measured.decode.push_back(static_cast<double>(tokens) / Since(start));
    }
    measured.read_gigabytes =
        std::max(measured.read_gigabytes, MeasureReadGigabytes(memory.span(), pool));
  }
  measured.bytes_per_token = runner.mean_bytes_per_token();
  measured.experts_per_token = runner.mean_experts_per_token();
  return measured;
}

uint64_t WeightBytes(const Model& model) {
  uint64_t bytes = model.embedding().bytes();
  if (model.lm_head().tensor != model.embedding().tensor) bytes += model.lm_head().bytes();
  for (const LayerSlices& layer : model.layers())
    bytes += layer.CommonBytes() + layer.ExpertBytes();
  return bytes;
}

void PrintTable(Session& session, const Model& model, const BenchFlags& flags,
                const Measured& measured) {
  const Speed prompt = Summary(measured.prompt), decode = Summary(measured.decode);
  const std::string name = fs::path(flags.model).filename().string();
  const auto row = [&](const std::string& test, const Speed& speed) {
    const std::string size = FormatBytes(WeightBytes(model));
    const double billions = static_cast<double>(model.parameter_count()) * 1e-9;
    const int threads = session.pool().num_threads();
    return flags.format == "csv"
               ? fmt::format("{},{},{:.3f},{},{},{:.2f},{:.2f}\n", name, WeightBytes(model),
                             billions, threads, test, speed.mean, speed.deviation)
               : fmt::format("| {} | {} | {:.2f} B | {} | {} | {:.2f} ± {:.2f} |\n", name, size,
                             billions, threads, test, speed.mean, speed.deviation);
  };
  std::string text =
      flags.format == "csv"
          ? "model,bytes,billion_parameters,threads,test,tokens_per_second,deviation\n"
          : "| model | size | params | threads | test | t/s |\n"
            "|---|--:|--:|--:|---|--:|\n";
  if (!measured.prompt.empty()) text += row(fmt::format("pp{}", flags.prompt_tokens), prompt);
  if (!measured.decode.empty()) text += row(fmt::format("tg{}", flags.new_tokens), decode);
  text.pop_back();
  session.Print(text);
  if (flags.format == "csv") return;
  session.Print(fmt::format(
      "machine now: RAM {:.1f} GB/s read, products {:.0f} GFLOP/s ({}, {} thread(s))",
      measured.read_gigabytes, measured.gemm_gigaflops, ActiveIsa(), session.pool().num_threads()));
  if (measured.decode.empty()) return;
  const double used = decode.mean * measured.bytes_per_token * 1e-9;
  session.Print(
      fmt::format("decode: {:.2f} experts a MoE layer, {:.3f} GB of weights a token: {:.1f} GB/s, "
                  "{:.0f} % of RAM's",
                  measured.experts_per_token, measured.bytes_per_token * 1e-9, used,
                  100 * used / measured.read_gigabytes));
}

int RunBench(Session& session, BenchFlags& flags) {
  if (flags.prompt_tokens == 0 && flags.new_tokens == 0) {
    throw UsageError("nothing to measure", "give -p or -n a number above 0");
  }
  const Model model = Model::Open(flags.model);
  BatchOptions options = {
      .slots = 1,
      .context_tokens = std::max(flags.prompt_tokens, std::max<int64_t>(flags.new_tokens, 8)),
      .memory_budget_bytes = session.memory_budget(),
      .compute = session.compute(),
      .kept_experts = WhatIf(session, model, flags.plan),
      .skip_betas = SkippingOf(model, flags.plan, flags.no_skip)};
  MemoryPlan plan = BatchRunner::Plan(model, options, session.pool().num_threads());
  plan.Add("memory to read", kReadBytes);
  session.RequireMemory(plan, "bench");
  if (session.flags.dry_run) {
    session.PrintDryRun("bench");
    return 0;
  }
  const Measured measured = Measure(session, model, flags, options);
  if (!session.flags.json) {
    PrintTable(session, model, flags, measured);
    return 0;
  }
  const Speed prompt = Summary(measured.prompt), decode = Summary(measured.decode);
  const auto number = [](const std::vector<double>& runs, double value) {
    return runs.empty() ? OrderedJson(nullptr) : OrderedJson(value);
  };
  session.PrintJson({{"schema", "winnow.bench/1"},
                     {"model", flags.model},
                     {"weight_bytes", WeightBytes(model)},
                     {"parameters", model.parameter_count()},
                     {"threads", session.pool().num_threads()},
                     {"isa", ActiveIsa()},
                     {"compute", session.flags.compute},
                     {"prompt_tokens", flags.prompt_tokens},
                     {"new_tokens", flags.new_tokens},
                     {"repetitions", flags.repetitions},
                     {"prompt_tokens_per_second", number(measured.prompt, prompt.mean)},
                     {"prompt_deviation", number(measured.prompt, prompt.deviation)},
                     {"decode_tokens_per_second", number(measured.decode, decode.mean)},
                     {"decode_deviation", number(measured.decode, decode.deviation)},
                     {"bytes_per_token", number(measured.decode, measured.bytes_per_token)},
                     {"experts_per_token", number(measured.decode, measured.experts_per_token)},
                     {"dram_gb_per_second", measured.read_gigabytes},
                     {"gemm_peak_gflops", measured.gemm_gigaflops},
                     {"peak_rss_bytes", PeakResidentBytes()}});
  return 0;
}

}  // namespace

void AddBench(CLI::App& app, Session& session) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* verb =
      app.add_subcommand("bench", "Tokens per second of a model, beside the machine's own limits");
  verb->set_help_flag("-h,--help", "Help");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("-p,--prompt-tokens", flags->prompt_tokens,
                   "Tokens of the prompt, pp in the table (default 512; 0: none)")
      ->check(WholeNumberFrom(0));
  verb->add_option("-n,--new-tokens", flags->new_tokens,
                   "Tokens decoded one by one from an empty context, tg (default 128; 0: none)")
      ->check(WholeNumberFrom(0));
  verb->add_option("-r,--repetitions", flags->repetitions,
                   "Runs that count, after one that does not (default 3)")
      ->check(WholeNumberFrom(1));
  verb->add_option("-o,--output", flags->format, "md (default) or csv; --json for all of it")
      ->check(CLI::IsMember({"md", "csv"}));
  verb->add_option("--plan", flags->plan, "Behave as if this plan were applied");
  verb->add_flag("--no-skip", flags->no_skip, "Run every expert, whatever config.json says");
  session.AddComputeFlags(*verb);
  verb->add_flag("--dry-run", session.flags.dry_run, "Say what would be held; do nothing");
  session.AddReportFlags(*verb);
  verb->footer("Tokens are random, as in llama-bench.\nExample: winnow bench MODEL -p 512 -n 128");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunBench(session, *flags); };
  });
}

}  // namespace winnow::cli
