#!/usr/bin/env bash
# ./dev fuzz [SECONDS]: every fuzz target for SECONDS over a corpus that starts from the seeds in
# tests/data and keeps growing in build/fuzz-corpus/. 0 seconds only replays the seeds.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT"

seconds=${1:-30}
[[ $seconds =~ ^[0-9]+$ ]] || die "fuzz: \"$seconds\" is not a number of seconds" "" 2

# Inputs a target may start from: the folder tests/data/fuzz/<target>, else files whose name suits it.
seed() {
  local target=$1 corpus=$2 file
  mkdir -p "$corpus"
  if [ -d "tests/data/fuzz/$target" ]; then
    cp -n tests/data/fuzz/"$target"/* "$corpus"/ 2>/dev/null || true
    return
  fi
  if [ "$target" = tokenizer_fuzz ]; then
    # Small tokenizers of every component, each with the texts of its cases.
    python3 - "$corpus" tests/data/tokenizers/components.jsonl <<'END'
import json, pathlib, sys
for number, line in enumerate(open(sys.argv[2], encoding="utf-8")):
    case = json.loads(line)
    text = "".join(str(one.get("text", "")) for one in case["cases"])[:256]
    seed = json.dumps(case["tokenizer"], ensure_ascii=False, separators=(",", ":")) + "\0\0" + text
    pathlib.Path(sys.argv[1], f"seed-{number:02}").write_bytes(seed.encode("utf-8", "surrogatepass"))
END
    return
  fi
  if [ "$target" = chat_fuzz ]; then
    # The templates of the tokenizers, and every construct.
    python3 - "$corpus" tests/data <<'END'
import json, pathlib, sys
corpus, data = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
templates = [json.loads(path.read_text(encoding="utf-8"))["chat_template"]
             for path in sorted(data.glob("tokenizers/*/tokenizer_config.json"))]
templates += [json.loads(line)["template"] for line in open(data / "chat/constructs.jsonl", encoding="utf-8")]
for number, template in enumerate(templates):
    (corpus / f"seed-{number:03}").write_bytes(template.encode("utf-8", "surrogatepass"))
END
    return
  fi
  case $target in
    *safetensors*) set -- -name '*.safetensors' ;;
    config_fuzz) set -- -name 'config.json' ;;
    index_fuzz) set -- -name '*.index.json' ;;
    *) set -- -name '*.json' ;;
  esac
  while IFS= read -r -d '' file; do
    cp -n "$file" "$corpus/seed-$(sha1sum "$file" | cut -c1-16)"
  done < <(find tests/data examples -type f -size -256k \( "$@" \) -print0 2>/dev/null)
}

replay_or_run() {
  local program=$1 corpus=$2
  if [ "$seconds" = 0 ]; then
    "$program" -runs=0 -rss_limit_mb=2048 -timeout=20 -artifact_prefix="$corpus-crash-" "$corpus"
  else
    "$program" -max_total_time="$seconds" -max_len=262144 -rss_limit_mb=2048 -timeout=20 -print_final_stats=1 \
      -artifact_prefix="$corpus-crash-" "$corpus"
  fi
}

title "Fuzz"
need build develop
configure asan-ubsan
mapfile -t targets < <(cmake --build build/asan-ubsan --target help | sed -n 's/^\([a-z0-9_]*_fuzz\):.*/\1/p')
[ ${#targets[@]} -gt 0 ] || die "there is no fuzz target"
build asan-ubsan "${targets[@]}"
failed=0
for target in "${targets[@]}"; do
  program=build/asan-ubsan/fuzz/$target corpus=build/fuzz-corpus/$target
  seed "$target" "$corpus"
  step "fuzz $target" replay_or_run "$program" "$corpus" || failed=1
  log=$LOGS/fuzz-$target.log
  awk -v target="$target" '
    /stat::number_of_executed_units/ { runs = $2 }
    /stat::average_exec_per_sec/ { rate = $2 }
    /cov: [0-9]+/ { for (i = 1; i < NF; ++i) { if ($i == "cov:") cov = $(i + 1); if ($i == "corp:") corp = $(i + 1) } }
    END { printf "    %s: %s coverage points, corpus %s%s\n", target, cov == "" ? 0 : cov, corp == "" ? 0 : corp,
                 runs == "" ? "" : ", " runs " runs, " rate " per second" }' "$log"
done
exit $failed
