// winnow doctor: is the machine, the file or the folder fit for use?
#include <fmt/format.h>

#include "doctor/health.h"
#include "session.h"

namespace winnow::cli {
namespace {

struct DoctorFlags {
  std::string path;
  bool quick = false;
};

int RunDoctor(Session& session, const DoctorFlags& flags) {
  const HealthReport report =
      flags.path.empty() ? CheckMachine(fs::current_path())
                         : CheckPath(flags.path, !flags.quick, session.pool(), session.control());
  session.FinishProgress();
  if (session.flags.json) {
    session.PrintJson({{"schema", "winnow.doctor/1"},
                       {"subject", report.subject},
                       {"path", flags.path},
                       {"facts", report.facts},
                       {"findings", report.findings}});
    return 0;
  }
  session.Print(fmt::format("{}{}{}", report.subject, flags.path.empty() ? "" : " ", flags.path));
  for (const std::string& fact : report.facts) session.Print("  " + fact);
  for (const std::string& finding : report.findings) session.Print("  finding: " + finding);
  session.Print(report.findings.empty() ? "  no findings"
                                        : fmt::format("  {} finding(s)", report.findings.size()));
  return 0;
}

}  // namespace

void AddDoctor(CLI::App& app, Session& session) {
  auto flags = std::make_shared<DoctorFlags>();
  CLI::App* verb = app.add_subcommand("doctor", "Check the machine, or a file or folder");
  verb->add_option(
      "PATH", flags->path,
      "Model folder, .safetensors, tokenizer.json, plan or statistics (default: the machine)");
  verb->add_flag("--quick", flags->quick, "Do not read the weights (no NaN, Inf and zero counts)");
  session.AddComputeFlags(*verb);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow doctor MODEL\nExit code 3 if it cannot be used, else 0.");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunDoctor(session, *flags); };
  });
}

}  // namespace winnow::cli
