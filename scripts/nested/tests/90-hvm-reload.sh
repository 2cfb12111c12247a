#!/usr/bin/env bash
# An HVM guest in lock-step: its secondary runs, is stopped, loaded and run again, RELOADS (50) times; then it is needed.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

readonly RELOADS=${RELOADS:-50}

nested up a b
clear_hosts hvm
start_host b "--listen 10.78.0.2:9740"
start_host a "--listen 10.78.0.1:9740 --guest hvm --xen /etc/xen/guests/hvm.cfg --disk-mib 16"
wait_until 600 said a hvm GUEST-READY || die "hvm did not get ready: $(nested console a hvm | tail -n 5)"
RUN_SECONDS=240 host a "xl-colo protect 10.78.0.2:9740 --mode colo $PATIENT --wait"
before=$(checkpoints)
# A write a round: the state to load differs each time, and the disk's too.
for round in $(seq "$RELOADS"); do
	code=$(put a "round-$round" "state $round") || die "round $round: no answer"
	[[ $code == 201 ]] || die "round $round: the write was answered $code"
	host a 'xl-colo checkpoint' >/dev/null || die "round $round: no checkpoint"
done
enough() { [[ $(($(checkpoints) - before)) -ge $RELOADS ]]; }
holds "at least $RELOADS reloads since the first copy" enough
echo "figure: $(($(checkpoints) - before)) reloads; pauses in us: $(host a 'xl-colo status --json' |
	sed -E 's/.*("pause_us":\{[^}]*\}).*/\1/')"
holds "b stands by" host b 'xl-colo status | grep -q "standing by"'
nested kill a
taken_over() { host b 'xl-colo status | grep -q "taken over"'; }
holds "b takes over" wait_until 120 taken_over
for round in 1 $((RELOADS / 2)) "$RELOADS"; do
	read_back() { [[ $(get b "round-$round") == "state $round" ]]; }
	holds "round $round is on the survivor" wait_until 60 read_back
done
expect "and it takes a write" 201 "$(put b after "after $RELOADS reloads")"
host b 'xl-colo stop; xl destroy hvm'
