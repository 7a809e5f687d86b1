#!/usr/bin/env bash
# ./dev verify DATA [--transformers]: compares the program with reference implementations. DATA holds
# checks/*.py and what they read (golden/, reference/, models/). Python packages go into build/venv.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

data='' with_transformers=''
for argument in "$@"; do
  case $argument in
    --transformers) with_transformers=1 ;;
    -*) die "verify: unknown option $argument" "" 2 ;;
    *) data=$argument ;;
  esac
done
[ -d "$data/checks" ] || die "verify: \"$data\" is not a folder with checks/" "./dev verify DATA [--transformers]" 2
data=$(cd "$data" && pwd)
cd "$ROOT"
python=$ROOT/build/venv/bin/python

# install_python MODULE...: once; asks the interpreter, not pip.
install_python() {
  [ -x "$python" ] || python3 -m venv "$ROOT/build/venv" || return
  ! "$python" -c "import $(IFS=, && echo "$*")" 2>/dev/null || return 0
  # torch for the CPU alone; the one on PyPI brings 2 GB of GPU libraries and is the second choice.
  [[ " $* " != *" torch "* ]] || "$python" -m pip install -q --retries 0 torch \
    --index-url https://download.pytorch.org/whl/cpu || true
  "$python" -m pip install -q "$@"
}

rows=() failed=0
# check NAME WORST_AWK COMMAND...: one row of the table; WORST_AWK prints the worst difference from the output.
check() {
  local name=$1 worst=$2 status=0 start log result
  shift 2
  start=$(now_us)
  log=$LOGS/verify-${name//[^A-Za-z0-9_.-]/-}.log
  mkdir -p "$LOGS"
  "$@" </dev/null >"$log" 2>&1 || status=$?
  result=$(tail -n 1 "$log" | sed 's/^[a-z]*: //' | cut -c 1-40)
  rows+=("$(printf '  %-28s %-34s %-28s %6s s  %s' "$name" "$result" "$(awk "$worst" "$log")" \
    "$(seconds_since "$start")" "$([ $status = 0 ] && echo "${green}ok$plain" || echo "${red}FAILED$plain")")")
  printf '%s\n' "${rows[-1]}"
  if [ $status != 0 ]; then
    failed=1
    head -n 6 "$log" | cut -c 1-160 >&2
  fi
}

golden_worst='/ ok / { for (i = 1; i < NF; ++i) { if ($i == "logits" && $(i+1) + 0 > l) l = $(i+1) + 0
                                                  if ($i == "hidden" && $(i+1) + 0 > h) h = $(i+1) + 0 } }
              END { printf "logits %.1e hidden %.1e", l, h }'
share_worst='/worst at/ { for (i = 1; i < NF; ++i) if ($i == "at" && $(i+1) + 0 >= w) { w = $(i+1) + 0; n = $1 } }
             END { if (n != "") printf "%s %.3f of tolerance", n, w }'
logits_worst='/logits/ { if ($NF + 0 > w) w = $NF + 0 } END { printf "logits %.1e", w }'
nothing='END { print "" }'

title "Verify against $data"
need build test
[ -x "$python" ] || need verify
configure release
build release
step "python environment" install_python numpy safetensors

c=$data/checks
check "golden checkpoints" "$golden_worst" "$python" "$c/golden.py" "$WINNOW" "$data/golden/models" \
  mixtral qwen2_moe qwen3_moe olmoe deepseek
check "tokenizers" "$nothing" "$python" "$c/tokenizer.py" "$WINNOW" "$data/golden/tokenizers"
check "hostile files" "$nothing" "$python" "$c/hostile.py" "$WINNOW" "$data/golden/hostile"
check "NAEE tiny" "$share_worst" "$python" "$c/naee.py" "$WINNOW" "$data/reference/methods/tiny-mixtral" \
  "$data/reference/methods/naee-tiny" --skip
check "NAEE sample" "$share_worst" "$python" "$c/naee.py" "$WINNOW" "$data/models/sample-mixtral" \
  "$data/reference/methods/naee-sample" --skip
for size in tiny sample; do
  model=$data/reference/methods/tiny-deepseek
  [ $size = tiny ] || model=$data/models/sample-deepseek
  check "CD-MoE $size" "$share_worst" "$python" "$c/cdmoe.py" "$WINNOW" "$model" "$data/reference/methods/cdmoe-$size"
done
check "fine-tuning" "$share_worst" "$python" "$c/finetune.py" "$WINNOW" "$data/reference/methods/tiny-deepseek" \
  "$data/reference/methods/cdmoe-tiny" "$data/reference/methods/finetune-tiny"
if [ -n "$with_transformers" ]; then
  step "torch and transformers" install_python torch transformers
  check "transformers" "$logits_worst" "$python" tools/roundtrip_transformers.py --winnow "$WINNOW"
  check "exported modelling code" "$logits_worst" "$python" tools/export_code_check.py --winnow "$WINNOW" \
    --golden "$data/golden/models"
fi
if [ $failed = 0 ]; then echo "verify: all agree"; else echo "verify: something differs (logs in build/logs)"; fi
exit $failed
