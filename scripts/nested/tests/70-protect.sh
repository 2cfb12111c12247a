#!/usr/bin/env bash
# A PVH guest under protection: captured again and again at full speed, then its protector killed, then a protection
# that is refused. Afterwards nothing of ours is left in the hypervisor, and xl works as before.
#
# SUSPENDS (200) is how often the guest is suspended. A large number needs more TEST_SECONDS, two or three for each.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

readonly SUSPENDS=${SUSPENDS:-200}

enough() {
	[[ $(checkpoints) -ge $SUSPENDS ]]
}

ticks() {
	host a 'grep -c GUEST-TICK /var/log/xen/guest-pvh.log'
}

start_pair() {
	start_host b "--listen 10.78.0.2:9740"
	start_host a "--listen 10.78.0.1:9740 --guest pvh --xen /etc/xen/guests/pvh.cfg --disk-mib 16"
	wait_until 200 said a pvh GUEST-READY || die "the guest did not get ready"
}

nested up a b
clear_hosts pvh
start_pair

refused=$(RUN_SECONDS=120 host a 'xl-colo protect 10.78.0.2:9740 --mode colo --wait' || true)
[[ $refused == *"a guest with PV drivers cannot run twice"* ]] || die "COLO was not refused, or not for that: $refused"
echo "ok: refused: $refused"
holds "the dirty log is off after a refusal" is_not_logged

# xl itself hears that the guest suspends.
saves() {
	RUN_SECONDS=120 host a 'xl save -c pvh /run/disks/pvh.save && [[ -s /run/disks/pvh.save ]]; code=$?; rm -f /run/disks/pvh.save; exit $code'
}

protects() {
	RUN_SECONDS=300 host a "xl-colo protect 10.78.0.2:9740 --mode remus --checkpoint-delay-ms 1 $PATIENT --wait"
}

protects
holds "it is unprotected" host a 'xl-colo unprotect'
holds "xl saves it" saves
protects
holds "the dirty log is on" is_logged
wait_until $((600 + 2 * SUSPENDS)) enough || die "only $(checkpoints) checkpoints: $(host a 'tail -n 3 /run/a.log')"
echo "ok: $(checkpoints) checkpoints; pauses in us: $(host a 'xl-colo status --json' | sed -E 's/.*("pause_us":\{[^}]*\}).*/\1/')"
before=$(ticks)
sleep 8
holds "the guest's clock goes on ($before ticks, then $(ticks))" test "$(ticks)" -gt "$before"
check_registers a pvh

host a 'kill -KILL $(</run/a.pid)'
wait_until 20 is_not_logged || die "the dirty log is still on: $(paging)"
echo "ok: the dirty log is off after the protector was killed"
wait_until 20 is_running pvh || die "the guest does not run: $(host a 'xl list')"
echo "ok: the guest runs"
holds "xl pauses and unpauses it" host a 'xl pause pvh && xl unpause pvh'
holds "xl saves it" saves
wait_until 120 host b 'xl list pvh >/dev/null 2>&1' || die "b did not take over: $(host b 'xl list; tail -n 5 /run/b.log')"
echo "ok: host b has taken over"
host b 'xl-colo stop'

# Host b has a domain of that name now, so it cannot stand by for another.
host a 'xl destroy pvh; rm -f /run/disks/*'
start_pair
refused=$(RUN_SECONDS=120 host a 'xl-colo protect 10.78.0.2:9740 --mode remus --wait' || true)
[[ $refused == *"is called pvh already"* ]] || die "not refused, or not for that: $refused"
echo "ok: refused: $refused"
holds "the dirty log is off after a refusal" is_not_logged
holds "the guest runs" is_running pvh
host a 'xl-colo stop; xl destroy pvh'
host b 'xl-colo stop; xl destroy pvh'
