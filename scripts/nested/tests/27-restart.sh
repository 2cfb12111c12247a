#!/usr/bin/env bash
# The host's daemon is killed, and ended, again and again under a PVH guest that serves clients, and started again: it
# goes on with the guest, its NIC and its disk. No answered write is lost, and one connection lives through it all. Then
# the guest is protected as any other, its daemon killed, and the other host has it: here it is set aside.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

readonly A='--listen 10.78.0.1:9740 --arbiter 10.78.0.2:9739 --guest pvh --xen /etc/xen/guests/pvh.cfg --disk-mib 16'

goes_on() {
	local before
	before=$(acked b)
	start_host a "$A"
	wait_until 120 has_acked b $((before + 5)) || die "no write is answered: $(host a 'tail -n 5 /run/a.log')"
	echo "ok: after $1 the guest goes on, $(acked b) writes are answered"
}

nested up a b
clear_hosts pvh
host b 'rm -f /run/register; setsid xl-colo arbiter --listen 10.78.0.2:9739 --file /run/register </dev/null >/run/arbiter.log 2>&1 &'
export POLICY=arbiter
start_host a "$A"
wait_until 200 said a pvh GUEST-READY || die "the guest did not get ready"
domid=$(host a 'xl domid pvh')
start_writer b
wait_until 60 has_acked b 5 || die "no write is answered"

for signal in KILL TERM KILL KILL; do
	host a "kill -$signal \$(</run/a.pid); while [[ -d /proc/\$(</run/a.pid) ]]; do sleep 0.1; done"
	goes_on "SIG$signal"
done
check_writer b
expect "it is the same domain" "$domid" "$(host a 'xl domid pvh')"
holds "the guest saw no error" host a '! grep -aE "I/O error|GUEST-ERROR|BACKWARDS" /var/log/xen/guest-pvh.log'

start_host b '--listen 10.78.0.2:9740 --arbiter 10.78.0.2:9739'
RUN_SECONDS=300 host a "xl-colo protect 10.78.0.2:9740 --mode remus $PATIENT --wait"
expect "a protected write" 201 "$(put b protected 'written under protection')"
host a 'kill -KILL $(</run/a.pid)'
taken_over() { host b 'xl-colo status | grep -q "taken over"'; }
holds "the other host takes over" wait_until 120 taken_over
start_host a "$A"
status=$(host a 'xl-colo status')
[[ $status == *'host b holds generation'*"domain $domid"*'xl destroy pvh'* ]] || die "the first host says: $status"
echo "ok: the first host knows that it is not its guest any more"
expect "and what is left of it here is paused" p "$(host a 'xl list pvh | awk "NR == 2 { print \$5 }" | tr -d -')"
served() { [[ $(get b protected) == 'written under protection' ]]; }
holds "the guest answers at the other host" wait_until 60 served
host a 'xl-colo stop; xl destroy pvh'
host b 'xl-colo stop; xl destroy pvh; kill $(pidof xl-colo)'
