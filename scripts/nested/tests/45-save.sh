#!/usr/bin/env bash
# xl with our engine under it: saves, restores, migrates and runs Remus, alone and against libxl's own engine.
# shellcheck source-path=SCRIPTDIR source=../engines.sh
. "$(dirname "${BASH_SOURCE[0]}")/../engines.sh"

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

nested up a
start_plain "$CONFIG"

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
