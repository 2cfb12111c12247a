#!/usr/bin/env bash
# Everything CI does, for a person as well: style, lints, docs, tests, the demo with a real curl, and real Xen hosts.
# XEN_COLO_NESTED=0 leaves the real Xen hosts out: the longest part (about half an hour by the sum of its steps). It is the
# last one, and what of it would begin later than XEN_COLO_CI_SECONDS (4300) after the start is skipped, by name.
# The last line is the sum of what really ran: `N passed, N failed`. Exit code 0 only if nothing failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-always}
export XEN_COLO_SEEDS=${XEN_COLO_SEEDS:-20000}

readonly LOGS=target/ci
readonly BINARY=target/release/xl-colo
readonly START_SECONDS=60
readonly CI_SECONDS=${XEN_COLO_CI_SECONDS:-4300}
# Left out for their time, which is to be half an hour in all: 25-disk-lost, 27-restart, 74-remus, 75-two-disks and
# 76-remus-colo (three to six minutes each), 30-hvm (the demos boot that guest too), 45-save (ten minutes), 60-on-xen, and
# 90-hvm-reload (eight minutes).
readonly NESTED_FIRST=(10-hosts 20-pvh 50-power-cut 70-protect)
readonly NESTED_LAST=(72-signals 40-hotplug-errors 80-refusals 78-back 73-signals-hvm 85-two-releases)
FEATURES=(--features xen)

passed=0
failed=0
broken=()

fail() {
	failed=$((failed + 1))
	broken+=("$1")
	echo "FAILED: $1" >&2
}

# step NAME COMMAND...: must succeed, and counts only when it does not.
step() {
	local name=$1 begun=$SECONDS
	shift
	printf '\n== %s\n' "$name"
	"$@" || fail "$name"
	echo "($name: $((SECONDS - begun)) s)"
}

# check NAME COMMAND...: a test of its own.
check() {
	local name=$1 begun=$SECONDS
	shift
	printf '\n== %s\n' "$name"
	if "$@"; then
		passed=$((passed + 1))
		echo "ok: $name ($((SECONDS - begun)) s)"
	else
		fail "$name"
	fi
}

# The tests, counted from what their binaries said. Two guests of real kernels come last and have the machine for
# themselves: what one of them is late with, because others had the processor, is a difference between the two.
run_tests() {
	printf '\n== tests (%s seeds)\n' "$XEN_COLO_SEEDS"
	local log=$LOGS/test.log rc=0 counts
	{
		CARGO_TERM_COLOR=never cargo test --no-fail-fast --workspace "${FEATURES[@]}" -- --skip lock_step:: 2>&1 || rc=$?
		CARGO_TERM_COLOR=never cargo test --no-fail-fast "${FEATURES[@]}" --test all lock_step:: 2>&1 || rc=$?
		[[ $rc -eq 0 ]]
	} | tee "$log" || rc=$?
	counts=$(sed -nE 's/^test result: .* ([0-9]+) passed; ([0-9]+) failed;.*/\1 \2/p' "$log" |
		awk '{ p += $1; f += $2 } END { print p + 0, f + 0 }')
	passed=$((passed + ${counts% *}))
	failed=$((failed + ${counts#* }))
	if [[ ${counts#* } -gt 0 ]]; then
		broken+=("${counts#* } tests")
		# Once more at the very end: what comes in between is long.
		sed -nE '/^failures:$/,/^test result: /p' "$log" | head -n 300 >"$LOGS/failures"
	elif [[ $rc -ne 0 ]]; then
		fail "cargo test (exit code $rc, though no test said that it failed)"
	elif [[ ${counts% *} -eq 0 ]]; then
		fail "cargo test (nothing ran)"
	fi
}

docs() {
	RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps "${FEATURES[@]}"
}

lint_scripts() {
	if command -v shellcheck >/dev/null; then
		shellcheck -x scripts/*.sh .ci/run scripts/nested/{nested,test,demo,bench,*.sh} scripts/nested/dom0/* \
			scripts/nested/tests/*.sh scripts/nested/guest/init scripts/hotplug/* \
			scripts/packaging/*.sh scripts/packaging/deb/p* scripts/packaging/ocf/guest
	else
		echo "SKIP: shellcheck is not installed; the scripts are not checked"
	fi
}

# A demo that reports for people: its exit code is its word.
demo() {
	timeout 300 "$BINARY" demo "$@"
}

# A demo that reports for programs: its object must say the same.
demo_json() {
	local report
	report=$(timeout 300 "$BINARY" demo --json "$@") || return 1
	echo "$report"
	[[ $report == *'"connection_kept":true'* && $report == *'"lost_writes":0'* ]]
}

# The survivor must answer one curl that began before the primary was lost, over one connection.
curl_survives() {
	local mode=$1 signal=$2 log=$LOGS/serve-$1-$2.log out=$LOGS/curl-$1-$2 url pid victim rc=0
	"$BINARY" demo --mode "$mode" --serve 127.0.0.1:0 2>"$log" &
	pid=$!
	if url=$(said "$log" 's#.*the guest answers at (http://[^/]*)/.*#\1#p') &&
		victim=$(said "$log" 's#.*host a \(primary\) is pid ([0-9]+),.*#\1#p'); then
		curl_over_loss "$url" "$victim" "$signal" "$out" || rc=1
	else
		rc=1
	fi
	kill -INT "$pid" 2>/dev/null || true
	wait "$pid" || rc=1
	[[ $rc -eq 0 ]] || cat "$log" >&2
	return "$rc"
}

# said LOG SED: what the demo printed, once it has.
said() {
	local until=$((SECONDS + START_SECONDS)) found
	while [[ $SECONDS -lt $until ]]; do
		found=$(sed -nE "$2" "$1" | head -n 1)
		if [[ -n $found ]]; then
			echo "$found"
			return 0
		fi
		sleep 0.1
	done
	return 1
}

curl_over_loss() {
	local url=$1 victim=$2 signal=$3 out=$4 reader connections wrong=0
	echo "a value that $victim must not take with it" >"$out.value"
	curl -sS --fail --max-time 60 -T "$out.value" "$url/k/ci[1-20]" >/dev/null || return 1
	# One read in 250 ms, all over one connection; each also says how many connections it had to open.
	curl -sS --fail --rate 4/s --max-time 60 -w '%{stderr}%{num_connects}\n' "$url/k/ci[1-20]" \
		>"$out.read" 2>"$out.connects" &
	reader=$!
	sleep 2
	kill "-$signal" "$victim" || return 1
	wait "$reader" || wrong=1
	if [[ $signal == STOP ]]; then
		# The old primary wakes up, finds that it lost, and must do no harm.
		kill -CONT "$victim" || return 1
		sleep 1
		curl -sS --fail --max-time 10 "$url/k/ci1" | cmp - "$out.value" || return 1
	fi
	connections=$(awk '{ sum += $1 } END { print sum + 0 }' "$out.connects")
	for _ in {1..20}; do cat "$out.value"; done | cmp - "$out.read" || wrong=1
	echo "curl read 20 values over a kill -$signal of the primary, on $connections connection(s)"
	[[ $wrong -eq 0 && $connections -eq 1 ]]
}

demos() {
	check "demo: colo, primary killed" demo --mode colo --kill primary
	check "demo: colo, secondary killed" demo --mode colo --kill secondary
	check "demo: remus, primary killed" demo --mode remus --kill primary
	check "demo: remus, secondary killed" demo --mode remus --kill secondary
	check "demo: colo, primary killed, 512 MiB" demo --mode colo --kill primary --guest-mib 512
	check "demo: colo, primary killed, half of all answers differ" demo --mode colo --kill primary --diverge 50
	check "demo: colo, primary killed, JSON" demo_json --mode colo --kill primary
	check "demo: remus, primary killed, JSON" demo_json --mode remus --kill primary
	check "demo: colo, served to curl, primary killed" curl_survives colo KILL
	check "demo: remus, served to curl, primary stopped and woken" curl_survives remus STOP
}

# Real Xen, in QEMU: the harness's own tests, and the main job. Exit code 77 is the harness's word for a machine that
# cannot run it.
nested() {
	# Where only the time ran out, what is left is still skipped by name.
	nested_tests "${NESTED_FIRST[@]}" || [[ $SECONDS -gt $CI_SECONDS ]] || return 0
	check_in_time "real Xen: PVH, remus, primary killed" nested_demo --guest pvh --kill primary
	check_in_time "real Xen: HVM, colo, primary killed" nested_demo --guest hvm --kill primary
	check_in_time "real Xen: PVH, remus, secondary killed" nested_demo --guest pvh --kill secondary
	check_in_time "real Xen: HVM, colo, secondary killed" nested_demo --guest hvm --kill secondary
	nested_tests "${NESTED_LAST[@]}" || true
}

# As check, if there is time left to begin.
check_in_time() {
	if [[ $SECONDS -le $CI_SECONDS ]]; then
		check "$@"
	else
		echo "SKIP: $1: no time is left for it ($CI_SECONDS s)"
	fi
}

# nested_tests NAME...: not if nothing of it could run.
nested_tests() {
	local log=$LOGS/nested-$1.log rc=0 counts
	printf '\n== tests on nested Xen hosts: %s\n' "$*"
	# Each call has a place of its own: the next one would clear what a test left that failed.
	# What begins last must have ended before the machine is taken away.
	TEST_SECONDS=900 TEST_LOGS=$PWD/$LOGS/nested-$1 BEGIN_UNTIL=$((EPOCHSECONDS - SECONDS + CI_SECONDS)) bash scripts/nested/test "$@" 2>&1 |
		tee "$log" || rc=$?
	if [[ $rc -eq 77 ]]; then
		echo "SKIP: real Xen: $(tail -n 1 "$log")"
		return 1
	fi
	counts=$(sed -nE 's/^([0-9]+) passed, ([0-9]+) failed, .*/\1 \2/p' "$log" | tail -n 1)
	if [[ -z $counts ]]; then
		fail "nested tests (exit code $rc, and no count)"
		return 0
	fi
	passed=$((passed + ${counts% *}))
	failed=$((failed + ${counts#* }))
	[[ ${counts#* } -eq 0 ]] || broken+=("${counts#* } nested tests")
}

# The Debian package, in a clean Debian. Exit code 77 is its word for a machine that cannot do that.
package() {
	printf '\n== the package in a clean Debian\n'
	local begun=$SECONDS rc=0
	scripts/packaging/test-deb.sh || rc=$?
	case $rc in
	0)
		passed=$((passed + 1))
		echo "ok: the package ($((SECONDS - begun)) s)"
		;;
	77) ;;
	*) fail "the package" ;;
	esac
}

nested_demo() {
	timeout 900 scripts/nested/demo "$@"
}

main() {
	mkdir -p "$LOGS"
	rm -f "$LOGS/failures"
	step "tools" scripts/install-deps.sh
	step "format" cargo fmt --check
	step "scripts" lint_scripts
	step "a build without Xen" cargo check
	if [[ ! -e /usr/include/xenctrl.h ]]; then
		echo "SKIP: everything of Xen: no libxen-dev here"
		FEATURES=()
	fi
	step "clippy" cargo clippy --workspace --all-targets "${FEATURES[@]}" -- -D warnings
	step "docs" docs
	run_tests
	step "release build" cargo build --release "${FEATURES[@]}"
	if [[ -x $BINARY ]]; then
		demos
		if [[ ${#FEATURES[@]} -gt 0 ]]; then
			package
		else
			echo "SKIP: the package: nothing of Xen is built"
		fi
		if [[ ${XEN_COLO_NESTED:-1} == 1 && ${#FEATURES[@]} -gt 0 ]]; then
			nested
		else
			echo "SKIP: real Xen hosts: XEN_COLO_NESTED=0, or nothing of Xen is built"
		fi
	else
		fail "demo (there is no $BINARY)"
	fi
	if [[ $passed -eq 0 ]]; then
		fail "everything: nothing passed"
	fi
	printf '\n%s minutes\n' "$((SECONDS / 60))"
	if [[ ${#broken[@]} -gt 0 ]]; then
		[[ ! -s $LOGS/failures ]] || cat "$LOGS/failures"
		printf 'failed: %s\n' "${broken[@]}"
	fi
	printf '%s passed, %s failed\n' "$passed" "$failed"
	[[ $failed -eq 0 ]]
}

main "$@"
