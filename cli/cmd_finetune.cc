// winnow finetune: trains chosen weights of a model on text and writes the changed checkpoint.
#include <fmt/format.h>

#include <cstdio>
#include <memory>
#include <numeric>
#include <optional>

#include "apply/checkpoint_rewriter.h"
#include "base/error.h"
#include "base/units.h"
#include "conversations.h"
#include "loss_curve.h"
#include "session.h"
#include "tokenizer/tokenizer.h"
#include "train/train_run.h"

namespace winnow::cli {
namespace {

struct FinetuneFlags {
  std::string model, output, train = "condensed-experts";
  std::vector<std::string> data;
  std::string rows, row_order, field = "text", protocol = "default", schedule;
  std::string dtype, log, curve, teacher, distill;
  bool train_prompt = false, pure_bf16 = false;
  int64_t block = 512, batch = 8, micro_batch = 0, epochs = 1, steps = 0;
  int64_t eval_every = 0, patience = 0;
  uint64_t seed = 42;
  double checkpoint_seconds = 60;
  std::optional<double> lr, warmup, min_lr, weight_decay, clip, held_out, aux_loss_alpha;
  double distill_weight = 1;
  bool published() const { return protocol == "cd-moe"; }
};

void CheckFlags(const FinetuneFlags& flags) {
  const auto refuse = [](bool wrong, const char* message, const char* hint) {
    if (wrong) throw UsageError(message, hint);
  };
  refuse(flags.data.empty() == flags.rows.empty(), "give either --data TEXT or --rows FILE",
         "--data reads texts, --rows token ids with masks");
  refuse(!flags.row_order.empty() && flags.rows.empty(), "--row-order needs --rows",
         "texts have no row numbers before they are cut");
  refuse(!flags.row_order.empty() && flags.held_out.value_or(0) > 0,
         "--row-order and --held-out do not go together",
         "the order says which rows are trained on");
  refuse(!flags.row_order.empty() && (flags.epochs != 1 || flags.steps != 0),
         "--row-order lists every step: --epochs and --steps say nothing more",
         "leave them out, or write the steps into the file");
  refuse(flags.published() && (!flags.schedule.empty() || flags.warmup || flags.min_lr),
         "--protocol cd-moe has a schedule of its own",
         "leave out --schedule, --warmup and --min-lr, or take the default protocol");
  refuse(flags.published() && !flags.teacher.empty(), "--protocol cd-moe knows no teacher",
         "take the default protocol for distillation");
  refuse(flags.teacher.empty() && (!flags.distill.empty() || flags.distill_weight != 1),
         "--distill and --distill-weight need --teacher MODEL",
         "the teacher is the model before it was compressed");
  refuse(flags.pure_bf16 && !flags.dtype.empty() && flags.dtype != "bf16",
         "--pure-bf16 keeps weights in bf16 alone", "leave out --dtype, or --pure-bf16");
  refuse(flags.patience > 0 && flags.eval_every == 0, "--patience needs --eval-every",
         "say after how many steps the held-out rows are scored");
}

std::vector<TrainRow> LoadRows(const FinetuneFlags& flags, const Model& model) {
  const EndOnInterrupt reading;
  std::vector<TrainRow> rows;
  if (!flags.rows.empty()) rows = ReadTrainRows(flags.rows, flags.published());
  std::optional<Tokenizer> tokenizer;
  for (const std::string& argument : flags.data) {
    const TextSource source = ParseTextSource(argument);
    std::vector<TrainRow> more;
    if (source.is_token_ids) {
      more = ReadTrainRows(source.path, flags.published());
    } else {
      if (!tokenizer) tokenizer.emplace(Tokenizer::Load(flags.model));
      TrainTextOptions options{.block_tokens = flags.block, .field = flags.field};
      options.prompt_counts = flags.train_prompt;
      options.conversation = MakeConversationEncoder(flags.model, *tokenizer);
      if (!model.config().eos_token_ids.empty()) options.end = model.config().eos_token_ids.front();
      more = RowsOfText(source, *tokenizer, options);
    }
    rows.insert(rows.end(), std::make_move_iterator(more.begin()),
                std::make_move_iterator(more.end()));
  }
  if (rows.empty()) throw UsageError("the data give no row of two tokens", "give more text");
  for (size_t i = 0; i < rows.size(); ++i) {
    const std::vector<float>& weights = rows[i].weights;
    if (weights.empty() ||
        std::any_of(weights.begin() + 1, weights.end(), [](float w) { return w > 0; })) {
      continue;
    }
    throw UsageError(fmt::format("row {} of the data has no token that counts", i),
                     "leave it out: there is nothing to learn from it");
  }
  for (const TrainRow& row : rows) {
    for (const int32_t id : row.ids) {
      if (id < model.config().vocab_size) continue;
      throw UsageError(fmt::format("token id {} is outside the model's vocabulary of {}", id,
                                   model.config().vocab_size),
                       "the ids were made with another tokenizer or another model");
    }
  }
  return rows;
}

TrainRows MakeRows(const FinetuneFlags& flags, const Model& model) {
  TrainRows data;
  data.rows = LoadRows(flags, model);
  const auto count = static_cast<int64_t>(data.rows.size());
  if (!flags.row_order.empty()) {
    data.steps = ReadStepOrder(flags.row_order, count);
    return data;
  }
  // More rows would judge no better and take longer than the training.
  constexpr double kUsualShare = 0.05, kUsualRows = 64;
  const double usual =
      flags.published() ? 0 : std::min(kUsualShare, kUsualRows / static_cast<double>(count));
  data.held_out = HeldOutRows(count, flags.held_out.value_or(usual));
  std::vector<int32_t> trained;
  size_t next = 0;
  for (int32_t row = 0; row < count; ++row) {
    if (next < data.held_out.size() && data.held_out[next] == row) {
      ++next;
    } else {
      trained.push_back(row);
    }
  }
  // With a number of steps, as many epochs as they take.
  const int64_t per_epoch =
      std::max<int64_t>(1, (static_cast<int64_t>(trained.size()) + flags.batch - 1) / flags.batch);
  const int64_t epochs = flags.steps > 0 ? (flags.steps + per_epoch - 1) / per_epoch : flags.epochs;
  data.steps = ShuffledSteps(trained, flags.batch, epochs, flags.seed, flags.steps);
  if (data.steps.empty()) {
    throw UsageError("--held-out leaves no row to train on", "hold out less, or give more text");
  }
  return data;
}

TrainOptions MakeOptions(const Session& session, const FinetuneFlags& flags, const Model& model,
                         const TrainRows& data, const Model* teacher) {
  TrainOptions options;
  options.parameters = ChooseParameters(model, flags.train);
  Schedule& schedule = options.schedule;
  schedule.peak = flags.lr.value_or(1e-5);
  schedule.warmup_share = flags.warmup.value_or(0.03);
  schedule.least_share = flags.min_lr.value_or(0.1);
  schedule.total_steps = std::ssize(data.steps);
  if (flags.schedule == "constant") schedule.shape = ScheduleShape::kConstant;
  if (flags.schedule == "linear") schedule.shape = ScheduleShape::kLinear;
  const OrderedJson& config = model.checkpoint().config();
  if (flags.published()) {
    schedule.shape = ScheduleShape::kPublished;
    int64_t rows = 0;
    for (const std::vector<int32_t>& step : data.steps) rows += std::ssize(step);
    schedule.total_steps = rows / flags.batch;
    options.pass.balance_alpha =
        config.contains("aux_loss_alpha") && config["aux_loss_alpha"].is_number()
            ? config["aux_loss_alpha"].get<double>()
            : 0.0;
  }
  if (flags.aux_loss_alpha) options.pass.balance_alpha = *flags.aux_loss_alpha;
  options.pass.balance_by_row = !config.contains("seq_aux") || config["seq_aux"] != false;
  options.pass.compute = session.compute();
  options.pass.micro_batch = flags.micro_batch;
  if (teacher != nullptr) {
    options.pass.teacher = teacher;
    options.pass.distill = flags.distill == "layers" ? Distill::kLayers : Distill::kLogits;
    options.pass.distill_weight = flags.distill_weight;
  }
  options.weight_decay = flags.weight_decay.value_or(0.01);
  options.clip = flags.clip.value_or(1.0);
  if (flags.dtype == "f32") options.dtype = Dtype::kF32;
  if (flags.dtype == "bf16") options.dtype = Dtype::kBF16;
  options.pure_bf16 = flags.pure_bf16;
  options.eval_every = flags.eval_every;
  options.patience = flags.patience;
  options.checkpoint_seconds = flags.checkpoint_seconds;
  options.memory_budget_bytes = session.memory_budget();
  options.resume = session.flags.resume;
  return options;
}

void CheckTeacher(const Model& model, const Model& teacher, const std::string& distill) {
  const ModelConfig &a = model.config(), &b = teacher.config();
  if (a.vocab_size != b.vocab_size) {
    throw UsageError(fmt::format("the teacher's vocabulary has {} tokens, the model's {}",
                                 b.vocab_size, a.vocab_size),
                     "teach with the model this one was made from");
  }
  if (distill != "layers") return;
  if (a.hidden_size != b.hidden_size || a.num_layers() != b.num_layers()) {
    throw UsageError("--distill layers needs a teacher with the same layers and hidden size",
                     "teach with the model this one was made from, or by --distill logits");
  }
}

// The plan that changes nothing: every expert of every MoE layer stays.
CompressionPlan UnchangedPlan(const Model& model) {
  CompressionPlan plan;
  plan.method = "finetune";
  plan.model_type = model.config().family->model_type;
  plan.model_fingerprint = model.checkpoint().FingerprintHex();
  plan.target = "winnow";
  for (const int32_t layer : model.config().MoeLayers()) {
    LayerPlan kept;
    kept.layer = layer;
    kept.num_experts = model.config().layers[static_cast<size_t>(layer)].num_experts;
    kept.kept.resize(static_cast<size_t>(kept.num_experts));
    std::iota(kept.kept.begin(), kept.kept.end(), 0);
    plan.layers.push_back(std::move(kept));
  }
  return plan;
}

// STEPS.jsonl: a line a step, in order.
class StepLog {
 public:
  explicit StepLog(const std::string& path) {
    if (!path.empty()) file_.emplace(File::Create(path));
  }
  void Add(const StepRecord& record) {
    if (!file_) return;
    OrderedJson json = {{"step", record.step},
                        {"lr", record.lr},
                        {"loss", record.loss},
                        {"grad_norm", record.gradient_norm}};
    if (record.held_out) json["held_out"] = *record.held_out;
    const std::string line = json.dump() + "\n";
    file_->WriteAt(bytes_, std::as_bytes(std::span(line)));
    bytes_ += line.size();
  }

 private:
  std::optional<File> file_;
  uint64_t bytes_ = 0;
};

fs::path ClaimWork(const Session& session, const FinetuneFlags& flags) {
  const fs::path folder = flags.output + ".finetune";
  ClaimWorkFolder(folder, session.flags, [](const std::string& name) {
    return name == "state.safetensors" || name == "best.safetensors" ||
           name == "tuned.safetensors" || name == "state.safetensors.tmp" ||
           name == "best.safetensors.tmp" || name.ends_with(".spill");
  });
  return folder;
}

void Report(Session& session, const FinetuneFlags& flags, const TrainResult& result,
            const TrainRows& data) {
  const double rate = result.seconds > 0 ? static_cast<double>(result.tokens) / result.seconds : 0;
  const double first = result.steps.empty() ? 0 : result.steps.front().loss;
  const double last = result.steps.empty() ? 0 : result.steps.back().loss;
  if (session.flags.json) {
    OrderedJson json = {
        {"schema", "winnow.finetune/1"}, {"output", flags.output},
        {"steps", result.steps.size()},  {"tokens", result.tokens},
        {"tokens_per_second", rate},     {"loss", {{"first", first}, {"last", last}}}};
    if (result.held_out_before) {
      json["held_out"] = {{"rows", data.held_out.size()},
                          {"before", *result.held_out_before},
                          {"after", result.held_out_after.value_or(*result.held_out_before)}};
      if (result.best_step >= 0) json["held_out"]["best_step"] = result.best_step;
    }
    json["stopped_early"] = result.stopped_early;
    json["seconds"] = session.seconds();
    json["peak_rss_bytes"] = PeakResidentBytes();
    session.PrintJson(json);
    return;
  }
  session.Note(fmt::format("wrote {}: {} steps, {:.0f} tokens/s, loss {:.4f} -> {:.4f}",
                           flags.output, result.steps.size(), rate, first, last));
  if (result.held_out_before && result.held_out_after) {
    session.Note(fmt::format(
        "held-out rows: {:.4f} -> {:.4f}{}", *result.held_out_before, *result.held_out_after,
        result.stopped_early ? ", stopped early; the best weights are kept" : ""));
  }
  session.PrintUsage();
}

int RunFinetune(Session& session, const FinetuneFlags& flags) {
  CheckFlags(flags);
  RequireFreshOutput(flags.output, OutputKind::kFolder, session.flags, flags.model);
  for (const std::string& file : {flags.log, flags.curve}) {
    if (!file.empty() && !session.flags.resume) {
      RequireFreshOutput(file, OutputKind::kFile, session.flags);
    }
  }
  const fs::path folder = ClaimWork(session, flags);
  const Model model = Model::Open(flags.model);
  std::optional<Model> teacher;
  if (!flags.teacher.empty()) {
    teacher.emplace(Model::Open(flags.teacher));
    CheckTeacher(model, *teacher, flags.distill);
  }
  const TrainRows data = MakeRows(flags, model);
  const TrainOptions options =
      MakeOptions(session, flags, model, data, teacher ? &*teacher : nullptr);
  const TrainPlan plan = PlanTrain(model, data, options, session.pool().num_threads());
  session.RequireMemory(plan.memory, "finetune");
  uint64_t trained = 0;
  for (const Parameter& p : options.parameters) trained += p.count;
  session.Note(
      fmt::format("finetune: {} of {} weights, {} steps of {} rows, {} rows held out{}{}",
                  FormatCount(trained), FormatCount(model.parameter_count()), data.steps.size(),
                  data.steps.front().size(), data.held_out.size(),
                  plan.keep_tapes ? "" : "; intermediates are computed twice to fit the memory",
                  plan.spill_state ? "; the optimiser's state is on disk" : ""));
  const CompressionPlan unchanged = UnchangedPlan(model);
  ApplyOptions apply;
  apply.resume = session.flags.resume;
  apply.dtype = options.dtype;
  if (session.flags.dry_run) {
    const RewritePlan rewrite = PlanRewrite(model, unchanged, apply);
    session.PrintDryRun("finetune",
                        {{"steps", data.steps.size()},
                         {"trained_weights", trained},
                         {"bytes_to_write", rewrite.bytes_after + plan.bytes_to_write}});
    return 0;
  }
  StepLog log(flags.log);
  const TrainResult result =
      RunTrain(model, data, options, plan, folder, session.pool(), session.control(),
               [&](const StepRecord& record) { log.Add(record); });
  if (!flags.curve.empty()) {
    WriteFileAtomically(flags.curve, LossCurve(result.steps, result.held_out_before));
  }
  const WeightReplacements weights = TrainedWeights(options.parameters, result.weights);
  apply.replacements = &weights;
  apply.changes =
      fmt::format("{} weights ({}) were tuned with AdamW in {} steps{}.", FormatCount(trained),
                  flags.train, result.steps.size(), teacher ? " to follow a teacher" : "");
  ApplyPlan(model, unchanged, PlanRewrite(model, unchanged, apply), apply, flags.output,
            session.control());
  fs::remove_all(folder);
  Report(session, flags, result, data);
  return 0;
}

void AddDataFlags(CLI::App& verb, FinetuneFlags& flags) {
  verb.add_option(
      "--data", flags.data,
      "Training text: .txt, .jsonl with `text`, `prompt` and `completion`, or `messages`\n"
      "(also .xz .zst .gz), or token ids in .safetensors");
  verb.add_option("--rows", flags.rows,
                  "Prepared rows (.safetensors): input_ids [rows, T], optional attention_mask");
  verb.add_option("--row-order", flags.row_order, "JSON: a list of row numbers for each step");
  verb.add_option("--field", flags.field, "Key of the text in .jsonl (default text)");
  verb.add_option("--block", flags.block, "Tokens a row (default 512)")->check(WholeNumberFrom(2));
  verb.add_flag("--train-prompt", flags.train_prompt, "Prompts are learnt too, not answers alone");
  verb.add_option("--held-out", flags.held_out,
                  "Share of the rows that only judge (default 0.05, at most 64 rows; cd-moe: 0)")
      ->check(NumberFromTo(0, 0.9));
  verb.add_option("--seed", flags.seed, "Seed of the row order (default 42)");
}

void AddStepFlags(CLI::App& verb, FinetuneFlags& flags) {
  verb.add_option("--train", flags.train,
                  "condensed-experts (default), experts, router, norms, or patterns of tensor "
                  "names,\nseparated by commas");
  verb.add_option("--protocol", flags.protocol,
                  "default, or cd-moe: the published program to the letter")
      ->check(CLI::IsMember({"default", "cd-moe"}));
  verb.add_option("--lr", flags.lr, "Learning rate at its peak (default 1e-5)")
      ->check(NumberFromTo(0, 1));
  verb.add_option("--batch", flags.batch, "Rows a step (default 8)")->check(WholeNumberFrom(1));
  verb.add_option("--micro-batch", flags.micro_batch,
                  "Rows computed at once, gradients added up (default: all of a step)")
      ->check(WholeNumberFrom(1));
  verb.add_option("--epochs", flags.epochs, "Times through the rows (default 1)")
      ->check(WholeNumberFrom(1));
  verb.add_option("--steps", flags.steps, "Stop after so many steps (default: epochs decide)")
      ->check(WholeNumberFrom(1));
  verb.add_option("--schedule", flags.schedule, "constant, linear or cosine (default)")
      ->check(CLI::IsMember({"constant", "linear", "cosine"}));
  verb.add_option("--warmup", flags.warmup, "Share of the steps that warm up (default 0.03)")
      ->check(NumberFromTo(0, 1));
  verb.add_option("--min-lr", flags.min_lr, "Share of --lr at the end (default 0.1)")
      ->check(NumberFromTo(0, 1));
  verb.add_option("--weight-decay", flags.weight_decay, "Decoupled decay (default 0.01)")
      ->check(NumberFromTo(0, 1));
  verb.add_option("--clip", flags.clip, "Largest norm of the gradient (default 1; 0: no limit)")
      ->check(NumberFromTo(0, 1e9));
  verb.add_option("--aux-loss-alpha", flags.aux_loss_alpha,
                  "Weight of the routers' balance loss (default 0; cd-moe: the config's)")
      ->check(NumberFromTo(0, 100));
  verb.add_option("--teacher", flags.teacher, "Checkpoint folder of a model to learn from");
  verb.add_option("--distill", flags.distill,
                  "logits (default): KL of the next token; layers: the stream after each layer")
      ->check(CLI::IsMember({"logits", "layers"}));
  verb.add_option("--distill-weight", flags.distill_weight,
                  "Share of the teacher in the loss, the rest is the text's (default 1)")
      ->check(NumberFromTo(0, 1));
  verb.add_option("--eval-every", flags.eval_every, "Score held-out rows every so many steps")
      ->check(WholeNumberFrom(1));
  verb.add_option("--patience", flags.patience,
                  "Stop after so many scores without a better one, and keep the best weights")
      ->check(WholeNumberFrom(1));
}

}  // namespace

void AddFinetune(CLI::App& app, Session& session) {
  auto flags = std::make_shared<FinetuneFlags>();
  CLI::App* verb =
      app.add_subcommand("finetune", "Train chosen weights of a model, the rest frozen");
  verb->add_option("MODEL", flags->model, "Checkpoint folder")->required();
  verb->add_option("-o,--output", flags->output, "Checkpoint folder to write")
      ->required()
      ->transform(OutputPath);
  AddDataFlags(*verb, *flags);
  AddStepFlags(*verb, *flags);
  verb->add_option("--dtype", flags->dtype,
                   "Convert the weights: f32 or bf16 (default: as they are)")
      ->check(CLI::IsMember({"f32", "bf16"}));
  verb->add_flag("--pure-bf16", flags->pure_bf16,
                 "Weights and moments in bf16 without f32 copies, as published");
  verb->add_option("--log", flags->log, "Write a JSON line a step to this file");
  verb->add_option("--curve", flags->curve, "Write the loss as a picture (SVG)");
  verb->add_option("--checkpoint-seconds", flags->checkpoint_seconds,
                   "Seconds between saved states (default 60)")
      ->check(NumberFromTo(0, 1e6));
  session.AddComputeFlags(*verb);
  session.AddOutputFlags(*verb, true);
  session.AddReportFlags(*verb);
  verb->footer("Example: winnow finetune CONDENSED --data text.jsonl --lr 1e-5 -o TUNED");
  verb->callback([&session, flags] {
    session.action = [&session, flags] { return RunFinetune(session, *flags); };
  });
}

}  // namespace winnow::cli
