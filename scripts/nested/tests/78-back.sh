#!/usr/bin/env bash
# There and back: a protected guest's host loses its power, and the other takes over. The first comes back and protects the
# survivor, whose daemon is killed: the guest is where it was. One connection lives through it all, and no answered
# write is lost.
#
# GUEST (pvh) is which guest: pvh by checkpoints, hvm in lock-step.
# shellcheck disable=SC2016 source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

readonly GUEST=${GUEST:-pvh}
case $GUEST in
	pvh) mode=remus ;;
	hvm) mode=colo ;;
	*) die "GUEST is pvh or hvm, and not $GUEST" ;;
esac

taken_over() {
	host "$1" 'xl-colo status | grep -q "taken over"'
}

goes_on() {
	local before
	before=$(acked b)
	wait_until 120 has_acked b $((before + 10)) || die "no write is answered: $(host b 'tail -n 5 /run/b.log')"
	echo "ok: $1, $(acked b) writes are answered"
}

# What was taken over is merged into its image first.
protects() {
	local said
	said=$(RUN_SECONDS=400 host "$1" "xl-colo protect $2 --mode $mode $PATIENT --wait 2>&1") && return
	[[ $said == *'still being merged'* ]] || die "$1 does not protect the guest: $said"
	return 1
}

nested up a b
clear_hosts "$GUEST"
start_host b '--listen 10.78.0.2:9740'
start_host a "--listen 10.78.0.1:9740 --guest $GUEST --xen /etc/xen/guests/$GUEST.cfg --disk-mib 16"
wait_until 300 said a "$GUEST" GUEST-READY || die "the guest did not get ready"
protects a 10.78.0.2:9740
# From here on: in lock-step its connection begins with two numbers.
start_writer b
goes_on "the guest is protected"

nested kill a
wait_until 120 taken_over b || die "b did not take over: $(host b 'tail -n 5 /run/b.log')"
goes_on "host b has it"
nested up a
start_host a '--listen 10.78.0.1:9740'
wait_until 60 protects b 10.78.0.1:9740 || die "the guest is not protected again"
goes_on "it is protected by the host that came back"

host b 'kill -KILL $(</run/b.pid)'
wait_until 120 taken_over a || die "a did not take over: $(host a 'tail -n 5 /run/a.log')"
goes_on "host a has it again"
check_writer b
holds "it runs there by its own name" wait_until 20 is_running "$GUEST"
holds "the dirty log is off" is_not_logged
for each in a b; do
	# A domain's console goes by the name it was made with.
	holds "the guest has said nothing of an error on host $each" host $each "cd /var/log/xen
		ls guest-$GUEST--incoming.log >/dev/null && ! grep -aE 'I/O error|GUEST-ERROR|BACKWARDS' guest-$GUEST--incoming.log"
done
host a "xl-colo stop; xl destroy $GUEST"
host b "xl destroy $GUEST; kill \$(pidof xl-colo) 2>/dev/null; true"
