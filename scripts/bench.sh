#!/usr/bin/env bash
# Measurements, as ratios against a reference in the same run:
#   bench.sh checkpoint   how long a guest stands still, against a memory copy and against the classic order
#   bench.sh idle         what a protected idle guest costs each host, in percent of one core
#   bench.sh disk         threads against io_uring, both of fio's, on a file: what our server need not use
#   bench.sh nbd          our NBD server against qemu-nbd and nbdkit (15 minutes)
#   bench.sh replica      a protected disk against a pair of QEMUs: writes, checkpoints, takeovers (15 minutes)
#   bench.sh compare      our comparator against QEMU's and against a plain relay, and the engine alone (2 minutes)
#   bench.sh demo         the embedded guest's service, protected against unprotected (3 minutes)
#   bench.sh xen          our engine against Xen's own, for xl save and for Remus, on nested Xen hosts (20 minutes)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly BINARY=target/release/xl-colo
readonly IDLE_SECONDS=${IDLE_SECONDS:-10}
readonly IDLE_AIM_PERCENT=5
readonly START_SECONDS=60

usage() {
	sed -n '2,10s/^# //p' "${BASH_SOURCE[0]}" >&2
	exit 2
}

# CPU time of a process so far, in clock ticks.
ticks() {
	# The second field is the command's name, in parentheses; utime and stime are the 12th and 13th after it.
	sed 's/.*) //' "/proc/$1/stat" | awk '{ print $12 + $13 }'
}

percent() {
	awk -v ticks="$1" -v hz="$(getconf CLK_TCK)" -v s="$IDLE_SECONDS" 'BEGIN { printf "%.1f", 100 * ticks / hz / s }'
}

idle_mode() {
	local mode=$1 log demo_pid until pids a b before_a before_b after_a after_b
	log=$(mktemp)
	"$BINARY" demo --mode "$mode" --serve 127.0.0.1:0 2>"$log" &
	demo_pid=$!
	until=$((SECONDS + START_SECONDS))
	pids=
	while [[ -z $pids && $SECONDS -lt $until ]]; do
		sleep 0.1
		pids=$(sed -nE 's/.*host a \(primary\) is pid ([0-9]+), host b is pid ([0-9]+);.*/\1 \2/p' "$log")
	done
	if [[ -z $pids ]]; then
		cat "$log" >&2
		kill -INT "$demo_pid"
		return 1
	fi
	read -r a b <<<"$pids"
	sleep 1
	before_a=$(ticks "$a") before_b=$(ticks "$b")
	sleep "$IDLE_SECONDS"
	after_a=$(ticks "$a") after_b=$(ticks "$b")
	kill -INT "$demo_pid"
	wait "$demo_pid" || true
	rm -f "$log"
	a=$(percent "$((after_a - before_a))") b=$(percent "$((after_b - before_b))")
	echo "idle, $mode: primary $a %, secondary $b % of one core over $IDLE_SECONDS s (aim: under $IDLE_AIM_PERCENT %)"
	awk -v a="$a" -v b="$b" -v aim="$IDLE_AIM_PERCENT" 'BEGIN { exit !(a < aim && b < aim) }'
}

idle() {
	local rc=0
	cargo build --release --quiet
	idle_mode colo || rc=1
	idle_mode remus || rc=1
	return "$rc"
}

# fio's own engines on one file: its operations per second.
file_iops() {
	local engine=$1 rw=$2 direct=$3 depth=$4 jobs=$5 file=$6
	fio --name=disk --filename="$file" --ioengine="$engine" --rw="$rw" --bs=4k --direct="$direct" --iodepth="$depth" \
		--numjobs="$jobs" --size=256m --time_based --runtime=2 --group_reporting --thread --norandommap --invalidate=0 \
		--output-format=json | sed -n '/^{/,$p' |
		python3 -c 'import json, sys; j = json.load(sys.stdin)["jobs"][0]; print(j["read"]["iops"] + j["write"]["iops"])'
}

# As our server does it: one thread for what is in memory, sixteen for what is not.
disk() {
	local dir rw threads ring round
	dir=$(mktemp -d -p target)
	# shellcheck disable=SC2064 # this directory, now
	trap "rm -rf '$dir'" EXIT
	head -c 256M /dev/urandom >"$dir/image"
	for round in 1 2 3; do
		for rw in randread randwrite; do
			cat "$dir/image" >/dev/null
			threads=$(file_iops psync "$rw" 0 1 1 "$dir/image") ring=$(file_iops io_uring "$rw" 0 32 1 "$dir/image")
			awk -v w="$rw" -v r="$round" -v t="$threads" -v u="$ring" \
				'BEGIN { printf "round %d: %-9s in memory:     one thread %7.0f/s = %.2f of io_uring (%.0f/s)\n", r, w, t, t / u, u }'
			threads=$(file_iops psync "$rw" 1 1 16 "$dir/image") ring=$(file_iops io_uring "$rw" 1 32 1 "$dir/image")
			awk -v w="$rw" -v r="$round" -v t="$threads" -v u="$ring" \
				'BEGIN { printf "round %d: %-9s on the medium: 16 threads %7.0f/s = %.2f of io_uring (%.0f/s)\n", r, w, t, t / u, u }'
		done
	done
}

# executable NAME: which one it is of those that cargo says it has built.
executable() {
	sed -nE "s/.*\"executable\":\"([^\"]*\/$1-[^\"]*)\".*/\1/p" | tail -n 1
}

# A build of the program that stays: building a bench builds it again, with the mutants in.
copy_program() {
	cargo build --release --quiet
	mkdir -p target/bench
	cp "$BINARY" target/bench/xl-colo
}

case "${1:-}" in
disk) disk ;;
checkpoint) exec cargo bench --bench checkpoint ;;
idle) idle ;;
demo)
	# Images in memory: two hosts on one machine would wait for each other's flushes on one disk.
	[[ ! -d /dev/shm ]] || export TMPDIR=${TMPDIR:-/dev/shm}
	exec cargo bench --quiet --bench demo
	;;
nbd)
	copy_program
	limit=$(cargo bench --bench nbd_limit --no-run --message-format=json 2>/dev/null | executable nbd_limit)
	XL_COLO=${XL_COLO:-target/bench/xl-colo} NBD_LIMIT=$limit exec scripts/bench-nbd.sh
	;;
replica)
	cargo build --release --quiet
	built=$(cargo bench --bench replica --bench nbd_limit --no-run --message-format=json 2>/dev/null)
	program=$(executable replica <<<"$built")
	limit=$(executable nbd_limit <<<"$built")
	exec scripts/bench-replica "$program" "$limit"
	;;
compare)
	copy_program
	exec cargo bench --quiet --bench compare -- "$PWD/target/bench/xl-colo"
	;;
xen)
	cargo build --release --quiet --features xen
	exec scripts/nested/bench
	;;
*) usage ;;
esac
