#!/usr/bin/env bash
# ./dev demo: removes a quarter of the experts of one bundled model and quantises it, condenses two layers of another, and shows
# what that saves and costs. Every command is printed before it runs; everything it writes is in demo-output/.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$ROOT"

model=examples/sample-mixtral
smaller=demo-output/sample-keep6
report=demo-output/report.json
domains=(prose docs code math other)

# Prints a command as one would type it, then runs it.
show() {
  printf '\n%s$' "$bold"
  local word
  for word in "$@"; do if [[ $word = *' '* ]]; then printf ' "%s"' "$word"; else printf ' %s' "$word"; fi; done
  printf '%s\n' "$plain"
  "$@"
}

# json_number KEY FILE: the first number under a key.
json_number() { grep -o "\"$1\":[0-9.e+-]*" "$2" | head -n 1 | cut -d: -f2; }
mib() { awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'; }

title "Demo: prune a Mixture-of-Experts model"
need build
# The tests need a package more; a build that has them already keeps them.
if [ -z "$(missing_packages test)" ]; then tests=ON; else tests=OFF; fi
configure release -DWINNOW_TESTS=$tests
build release winnow
winnow=build/release/winnow
mkdir -p demo-output
started=$(now_us)

printf '\n%s1. What the model is%s\n' "$bold" "$plain"
show "$winnow" inspect "$model"

printf '\n%s2. Keep the 6 of 8 experts in each layer that matter on five kinds of text%s\n' "$bold" "$plain"
calib=("${domains[@]/#/examples/text/}")
text=("${calib[@]/%/.eval.txt.xz}")
calib=("${calib[@]/%/.calib.txt.xz}")
command=("$winnow" compress "$model" --keep 6 --calib "${calib[@]}" --text "${text[@]}" --force -o "$smaller" --json)
printf '\n%s$ %s%s\n' "$bold" "$(sed 's/ --\(calib\|text\|force\) / \\\n    --\1 /g' <<<"${command[*]} > $report")" "$plain"
"${command[@]}" >"$report"

printf '\n%s3. Both continue a text%s\n' "$bold" "$plain"
for folder in "$model" "$smaller"; do
  show "$winnow" run "$folder" -p "The old man" -n 30 --temp 0.7 --top-k 20 --seed 1 -q | tee "demo-output/words-${folder##*/}.txt"
done
words() { tail -n +3 "demo-output/words-${1##*/}.txt" | tr -s '\n' ' ' | cut -c 1-92; }

for folder in "$model" "$smaller"; do
  "$winnow" inspect "$folder" --json >"demo-output/inspect-${folder##*/}.json"
  "$winnow" run "$folder" -p "The old man" -n 200 --ignore-eos -q --json >"demo-output/run-${folder##*/}.json"
done
# both KEY PREFIX: the value under KEY for the original and for the pruned model.
both() { for folder in "$model" "$smaller"; do json_number "$1" "demo-output/$2-${folder##*/}.json"; done; }
both_mib() { for bytes in $(both "$@"); do mib "$bytes"; echo; done; }

printf '\n%s4. Another model, another way: two layers lose their router, and learn from the original%s\n' "$bold" "$plain"
routed=examples/sample-deepseek
condensed=demo-output/deepseek-condensed
tuned=demo-output/deepseek-tuned
show "$winnow" observe "$routed" --method condense --width 4 --calib "${calib[@]}" --blocks 24 --per-document 1 --force -q \
  -o demo-output/neurons
show "$winnow" plan demo-output/neurons --method condense --width 4 --moe-layers 0,1 --model "$routed" --force -q -o demo-output/condense.json
show "$winnow" apply "$routed" --plan demo-output/condense.json --force -q -o "$condensed"
show "$winnow" finetune "$condensed" --teacher "$routed" --data "${calib[@]}" --steps 10 --lr 1e-3 --held-out 0 --force \
  --curve demo-output/loss.svg -o "$tuned"
for folder in "$condensed" "$tuned"; do
  "$winnow" eval ppl "$folder" --against "$routed" --text "${text[@]}" --tokens 2048 -q --json >"demo-output/eval-${folder##*/}.json"
done

printf '\n%s5. Four bits a weight in the pruned experts, eight in the rest, rounded on the same text%s\n' "$bold" "$plain"
packed=demo-output/sample-keep6-4bit
show "$winnow" quantize "$smaller" --experts 4bit --rest 8bit --calib "${calib[@]}" --blocks 24 --force -q -o "$packed"
"$winnow" eval ppl "$packed" --against "$smaller" --text "${text[@]}" --tokens 2048 -q --json >demo-output/eval-packed.json
"$winnow" inspect "$packed" --json >demo-output/inspect-packed.json

printf '\n%sWhat it saved and what it cost%s\n' "$bold" "$plain"
{
  echo "|original|pruned"
  both num_experts inspect | paste -sd '|' | sed 's/^/experts in each layer|/'
  both_mib bytes inspect | paste -sd '|' | sed 's/^/weights|/'
  both_mib generate inspect | paste -sd '|' | sed 's/^/memory to run it|/'
  both decode_seconds run | awk '{ printf "%.0f ms\n", $1 * 1000 }' | paste -sd '|' | sed 's/^/time for 200 tokens|/'
  # One record a text: {"name":"prose.eval",...,"perplexity":P,...,"original":{...,"perplexity":Q},...}
  sed 's/.*"eval"://; s/{"name":/\n&/g' "$report" | awk '
    /^{"name":/ {
      split($0, word, "\""); name = word[4]; sub(/\.eval$/, "", name)
      if (split($0, part, "\"perplexity\":") == 3)
        printf "perplexity, %s|%.2f|%.2f|%+.0f %%\n", name, part[3], part[2], (part[2] / part[3] - 1) * 100
    }'
} | awk -F'|' '{ printf "  %-28s %12s %12s  %s\n", $1, $2, $3, $4 }'
# mean_increase FILE: of nll over the texts.
mean_increase() { sed 's/"difference":{"nll":/\n&/g' "$1" | awk -F'[:,]' '/^"difference"/ { sum += $3; n += 1 } END { printf "%+.3f", sum / n }'; }
printf '  two layers condensed: nll %s; after 10 steps of learning: %s (demo-output/loss.svg)\n' \
  "$(mean_increase demo-output/eval-deepseek-condensed.json)" "$(mean_increase demo-output/eval-deepseek-tuned.json)"
printf '  pruned and quantised: %s of weights, nll %s beside the pruned one in bf16\n' \
  "$(mib "$(json_number bytes demo-output/inspect-packed.json)")" "$(mean_increase demo-output/eval-packed.json)"
printf '  original: %s\n  pruned:   %s\n' "$(words "$model")" "$(words "$smaller")"
printf '  (pruned in %s s with %s of memory; the demo took %s s)\n' \
  "$(json_number seconds "$report" | awk '{ printf "%.1f", $1 }')" "$(mib "$(json_number peak_rss_bytes "$report")")" \
  "$(seconds_since "$started")"

printf '\n%sThe pruned, quantised model completes a line%s\n' "$bold" "$plain"
show "$winnow" run "$packed" -p "The old man" -n 24 --temp 0.7 --top-k 20 --seed 1 --stats

cat <<END

${bold}Next${plain}
  $winnow doctor                          what this machine offers, and what it cannot do
  $winnow inspect /path/to/your/model     any Mixtral, Qwen-MoE, OLMoE or DeepSeek-MoE checkpoint: its sizes
  $winnow compress MODEL --keep 6 --calib your-text.txt -o SMALLER
  $winnow quantize SMALLER --experts 4bit --rest 8bit --calib your-text.txt -o PACKED
  $winnow serve PACKED                    OpenAI's interface and a page to chat on http://127.0.0.1:8080
  $winnow observe MODEL --calib your-text.txt -o STATS   once; then plan and apply as often as you like
  $winnow --help
END
