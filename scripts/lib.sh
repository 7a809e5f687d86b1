# Shared by ./dev and the scripts it runs: steps with seconds, colours, packages, builds.
# shellcheck shell=bash
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LOGS=$ROOT/build/logs
export WINNOW=$ROOT/build/release/winnow

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
  bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'
else
  bold='' dim='' red='' green='' plain=''
fi

title() { printf '%s%s%s\n' "$bold" "$*" "$plain"; }
note() { printf '  %s\n' "$*"; }
die() {
  printf '%serror:%s %s\n' "$red" "$plain" "$1" >&2
  [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
  exit "${3:-1}"
}

# Microseconds since the epoch; some locales write the fraction behind a comma.
now_us() { printf '%s' "${EPOCHREALTIME/[.,]/}"; }
# seconds_since START_US -> "12.3"
seconds_since() {
  local us=$(($(now_us) - $1))
  printf '%d.%d' $((us / 1000000)) $((us % 1000000 / 100000))
}

# step NAME COMMAND...: runs quietly and prints one line with the seconds; what it printed is shown
# only if it fails. The whole output stays in build/logs/.
step() {
  local name=$1 log status=0 start
  shift
  mkdir -p "$LOGS"
  log=$LOGS/${name//[^A-Za-z0-9_.-]/-}.log
  start=$(now_us)
  if [ -t 1 ]; then
    set +e
    "$@" </dev/null 2>&1 | tee "$log" | show_progress "$name"
    status=${PIPESTATUS[0]}
    set -e
    printf '\r\e[K'
  else
    "$@" </dev/null >"$log" 2>&1 || status=$?
  fi
  if [ "$status" = 0 ]; then
    printf '  %-34s %sok%s %8s s\n' "$name" "$green" "$plain" "$(seconds_since "$start")"
  else
    printf '  %-34s %sFAILED%s %4s s\n' "$name" "$red" "$plain" "$(seconds_since "$start")"
    # A compiler's first error matters more than its last line.
    { grep -n -m 5 -A 6 -E '(error:|FAILED:)' "$log" || true; echo '...'; tail -n 25 "$log"; } >&2
    printf 'whole output: %s\n' "$log" >&2
  fi
  return "$status"
}

# The last line of a running command, redrawn in place.
show_progress() {
  local name=$1 line width
  width=$(tput cols 2>/dev/null || echo 80)
  while IFS= read -r line; do
    printf '\r\e[K%s' "${dim}$(printf '  %-34s %s' "$name" "$line" | cut -c "1-$((width - 1))")${plain}"
  done
}

# package_group GROUP...: the packages of these groups, one a line.
package_group() {
  local groups=" $* "
  awk -v groups="$groups" '
    /^#@/ { on = index(groups, " " $2 " ") > 0; next }
    /^[ \t]*(#|$)/ { next }
    on { print $1 }' "$ROOT/scripts/packages.txt"
}

# missing_packages GROUP...: those of them that are not installed (one question to dpkg).
missing_packages() {
  local wanted installed
  wanted=$(package_group "$@")
  # shellcheck disable=SC2086  # one argument a package
  installed=$(dpkg-query -W -f='${db:Status-Abbrev} ${Package}\n' $wanted 2>/dev/null |
    awk '$1 == "ii" || $1 == "hi" { print $2 }')
  grep -vxF -f <(printf '%s\n' "${installed:-none}") <<<"$wanted" || true
}

# need GROUP...: installs what is missing as root or through sudo; otherwise says how and stops.
need() {
  local missing as_root=()
  if ! command -v dpkg-query >/dev/null; then
    note "not a Debian system: needs what scripts/packages.txt lists ($*)"
    return
  fi
  missing=$(missing_packages "$@" | tr '\n' ' ')
  missing=${missing% }
  [ -n "$missing" ] || return 0
  if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
      as_root=(sudo)
      sudo -v || as_root=()
    fi
  fi
  if [ -n "${WINNOW_NO_INSTALL:-}" ] || { [ "$(id -u)" != 0 ] && [ ${#as_root[@]} = 0 ]; }; then
    printf '%serror:%s packages are missing and this user cannot install them. As root, run:\n' \
      "$red" "$plain" >&2
    printf 'apt-get update && apt-get install -y --no-install-recommends %s\n' "$missing" >&2
    exit 1
  fi
  # shellcheck disable=SC2086
  step "install $(wc -w <<<"$missing") packages" install_packages $missing
}

install_packages() {
  local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -y)
  # An unreachable third-party source is no reason to stop: the install below decides.
  "${apt[@]}" update || echo "apt-get update failed; trying with the lists there are"
  "${apt[@]}" install --no-install-recommends "$@"
}

# One compiler may need 0.8 GB: fewer jobs than cores on a machine with little memory.
build_jobs() {
  local cores memory_kb jobs
  cores=$(nproc)
  memory_kb=$(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo)
  jobs=$((memory_kb / 800000))
  [ "$jobs" -lt "$cores" ] || jobs=$cores
  [ "$jobs" -ge 1 ] || jobs=1
  printf '%s' "${WINNOW_JOBS:-$jobs}"
}

# configure PRESET [-DOPTION...]
configure() {
  local preset=$1
  shift
  if command -v ccache >/dev/null; then export CMAKE_CXX_COMPILER_LAUNCHER=ccache; fi
  step "configure $preset" cmake -S "$ROOT" --preset "$preset" "$@"
}

# build PRESET [TARGET...]
build() {
  local preset=$1
  shift
  step "build $preset" cmake --build "$ROOT/build/$preset" -j "$(build_jobs)" ${1+--target "$@"}
}

# run_ctest PRESET [CTEST ARGUMENT...]: prints CTest's own closing lines, everything if one fails.
run_ctest() {
  local preset=$1 status=0 log fixed_layout=()
  shift
  log=$LOGS/test-$preset.log
  # GCC 12's ThreadSanitizer cannot place its shadow where addresses have more than 28 random bits.
  if [ "$preset" = tsan ] && [ "$(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 28)" -gt 28 ]; then
    fixed_layout=(setarch "$(uname -m)" -R)
  fi
  step "test $preset" "${fixed_layout[@]}" ctest --test-dir "$ROOT/build/$preset" --output-on-failure --no-tests=error \
    -j "$(nproc)" "$@" || status=$?
  grep -E '^([0-9]+% tests passed|Total Test time|The following tests FAILED|No tests)' "$log" || true
  return "$status"
}
