#!/usr/bin/env bash
# The tests of package `xen`, in dom0, against a running guest.
# shellcheck source-path=SCRIPTDIR source=../check.sh
. "$(dirname "${BASH_SOURCE[0]}")/../check.sh"

[[ -e $ROOT/xen/tests/on_xen/main.rs ]] || die "there is no xen/tests/on_xen"
binary=$(cd "$ROOT" && cargo test -p xen --test on_xen --no-run --message-format=json |
	sed -nE '/"name":"on_xen"/s/.*"executable":"([^"]+)".*/\1/p' | tail -n 1)
[[ -x $binary ]] || die "cargo built no test binary"
nested up a
cp "$binary" "$SHARE/a/on_xen"
host a 'xl destroy pvh 2>/dev/null; rm -f /run/disks/pvh; true'
serve_disk a pvh
start_guest a pvh vif
RUN_SECONDS=400 host a 'cp /lab/a/on_xen /usr/sbin/ && XEN_COLO_ON_XEN=pvh on_xen --test-threads=1'
host a 'xl destroy pvh'
unserve_disk a pvh
