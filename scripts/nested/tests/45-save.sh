#!/usr/bin/env bash
# xl with our engine under it: saves, restores, migrates and runs Remus, alone and against libxl's own engine.
# shellcheck source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

export RUN_SECONDS=200

# A guest with nothing but memory and a processor: what it says on its console shows that both survived.
readonly CONFIG='name = "plain"
type = "pvh"
hap = 1
memory = 128
maxmem = 128
vcpus = 1
kernel = "/boot/vmlinux"
ramdisk = "/boot/guest.cpio.gz"
extra = "console=hvc0 quiet loglevel=4 mitigations=off guest.ip=10.77.0.2/24"
on_crash = "preserve"'

# under ours|stock COMMAND...: in dom0, with that engine.
under() {
	local engine=${1/ours/env LIBXL_SAVE_HELPER=/usr/sbin/xl-colo}
	host a "${engine/stock/env -u LIBXL_SAVE_HELPER} $2"
}

# While it arrives, a domain's name ends in --incoming, and so does its console's log ever after.
ticks() {
	host a "cat /var/log/xen/guest-plain*.log | grep -ac GUEST-TICK || true"
}

# lives WHAT: the guest says more than it has said, and nothing bad.
lives() {
	local before
	before=$(ticks)
	more() { [[ $(ticks) -gt $((before + 2)) ]]; }
	holds "$1: the guest goes on" wait_until 60 more
	holds "$1: its registers and its clock are right" \
		host a "! grep -ahE 'GUEST-[A-Z]+ ERROR|BACKWARDS|rcu: INFO|Oops|BUG:' /var/log/xen/guest-plain*.log"
}

save_and_restore() {
	local begun=$EPOCHREALTIME middle
	under "$1" 'xl save plain /tmp/plain.img >/tmp/xl.log 2>&1' || die "save under $1: $(host a 'tail -5 /tmp/xl.log')"
	middle=$EPOCHREALTIME
	under "$2" 'xl restore /tmp/plain.img >/tmp/xl.log 2>&1' || die "restore under $2: $(host a 'tail -5 /tmp/xl.log')"
	awk -v a="$begun" -v b="$middle" -v c="$EPOCHREALTIME" -v what="$1 $2" -v bytes="$(host a 'stat -c %s /tmp/plain.img')" \
		'BEGIN { split(what, e, " "); printf "figure: save %s %.2f s, %d bytes; restore %s %.2f s\n", e[1], b - a, bytes, e[2], c - b }'
	host a 'rm -f /tmp/plain.img'
	lives "saved by $1, restored by $2"
}

# To this very host: a second domain takes over from the first.
migrate() {
	local receiver="env -u LIBXL_SAVE_HELPER xl migrate-receive" begun=$EPOCHREALTIME
	[[ $2 == stock ]] || receiver="env LIBXL_SAVE_HELPER=/usr/sbin/xl-colo xl migrate-receive"
	under "$1" "xl migrate -s '' plain '$receiver' >/tmp/xl.log 2>&1" || die "migrate: $(host a 'tail -8 /tmp/xl.log')"
	awk -v a="$begun" -v b="$EPOCHREALTIME" -v what="$1 to $2" 'BEGIN { printf "figure: live migration %s %.2f s\n", what, b - a }'
	lives "migrated from $1 to $2"
}

nested up a
host a "xl destroy plain 2>/dev/null; rm -f /var/log/xen/guest-plain*.log
	cat >/tmp/plain.cfg <<'END'
$CONFIG
END
	xl create -q /tmp/plain.cfg"
holds "the guest is up" wait_until 120 said a plain 'GUEST-TICK'
wait_until 60 said a plain 'GUEST-[A-Z]+ ok' || true

save_and_restore stock ours
save_and_restore ours stock
save_and_restore ours ours
save_and_restore stock stock
migrate ours ours
migrate ours stock
migrate stock ours

# A full disk: the save fails, and the guest is none the worse.
host a 'mkdir -p /tmp/small && mount -t tmpfs -o size=20m small /tmp/small'
holds "a save to a full disk fails" under ours 'bash -c "! xl save plain /tmp/small/img" >/tmp/xl.log 2>&1'
holds "and says why" host a 'grep -q "No space left on device" /tmp/xl.log'
host a 'umount /tmp/small'
lives "after a failed save"

# A receiver that hangs: the helper is told to stop, as libxl does, and leaves no log-dirty behind.
hanging='printf "xl migration receiver ready, send binary domain data.\\n"; exec sleep 100'
host a "cat >/tmp/hang <<'END'
$hanging
END
	LIBXL_SAVE_HELPER=/usr/sbin/xl-colo xl migrate -s '' plain 'bash /tmp/hang' >/tmp/xl.log 2>&1 </dev/null &
	for _ in {1..100}; do pid=\$(pidof xl-colo) && break; sleep 0.1; done
	sleep 3; kill -TERM \$pid; for _ in {1..50}; do [[ -d /proc/\$pid ]] || break; sleep 0.1; done
	! [[ -d /proc/\$pid ]]; code=\$?; kill \$(pidof sleep); wait; exit \$code"
echo "ok: a helper that writes to nobody ends when it is told to"
lives "after a cancelled migration"
migrate ours ours

# Remus, to nobody: checkpoint after checkpoint. It ends as libxl ends it, by telling the helper: whoever ends xl within a
# checkpoint leaves a guest that nobody resumes, whatever the engine.
under ours "setsid xl -vvv remus -F -b -n -d -i 500 plain nobody >/tmp/xl.log 2>&1 </dev/null &"
host a "sleep 20; kill -TERM \$(pidof xl-colo); for _ in {1..300}; do pidof xl >/dev/null || break; sleep 0.1; done"
checkpoints=$(host a "grep -c 'wait for the guest to suspend' /tmp/xl.log || true")
echo "figure: Remus under ours, $checkpoints checkpoints in 20 s at 500 ms"
[[ $checkpoints -ge 4 ]] || die "only $checkpoints checkpoints: $(host a 'tail -5 /tmp/xl.log')"
holds "the guest is resumed" wait_until 30 host a 'xl unpause plain 2>/dev/null; xl list plain | grep -qE "[rb-]-----"'
lives "after Remus"

# Remus, to this host; then the primary dies. libxl 4.17 sees a guest that is destroyed while it waits for its suspend
# only when it has waited for 60 s, whatever the engine: the domain outlives the one event that says it is going.
for receiver in ours stock; do
	begun=$(ticks)
	under ours "setsid xl remus -F -n -d -i 500 -s '' plain '$([[ $receiver == ours ]] || echo env -u LIBXL_SAVE_HELPER) xl migrate-receive -r' >/tmp/xl.log 2>&1 </dev/null &"
	protected() { host a 'xl list plain--incoming >/dev/null 2>&1'; }
	holds "the secondary is being filled" wait_until 60 protected
	sleep 20
	host a 'xl destroy plain'
	holds "the $receiver secondary takes over" wait_until 120 host a 'xl list plain >/dev/null 2>&1'
	echo "ticks before $begun, now $(ticks)"
	lives "taken over by $receiver"
done
host a 'xl destroy plain'
