# Shared by the scripts of this folder; sourced, never run. Everything here is about the machine that runs the hosts.
# shellcheck shell=bash

NESTED=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$NESTED/../.." && pwd)
# Where images, sockets, logs and the share go. Sockets inside are named relative to a host's own folder: a socket's
# path has at most 107 bytes.
DIR=$(realpath -m "${XEN_COLO_NESTED_DIR:-$ROOT/target/nested}")
# What both dom0s see as /lab (9p).
SHARE=$DIR/share
export XEN_COLO_NESTED_DIR=$DIR NESTED ROOT SHARE

readonly SKIPPED=77

say() {
	echo "nested: $*" >&2
}

die() {
	say "$*"
	exit 1
}

# The machine cannot do it: say so loudly, and with an exit code that no failure has.
skip() {
	echo "SKIP: nested Xen: $*"
	exit "$SKIPPED"
}

# Each command the harness drives, and Debian's package of it.
readonly TOOLS=(qemu-system-x86_64:qemu-system-x86 mmdebstrap:mmdebstrap cpio:cpio xz:xz-utils depmod:kmod socat:socat
	dpkg-deb:dpkg apt-get:apt setsid:util-linux)

missing_packages() {
	local tool
	for tool in "${TOOLS[@]}"; do
		command -v "${tool%%:*}" >/dev/null || printf '%s\n' "${tool#*:}"
	done | sort -u
}

install_packages() {
	local packages
	mapfile -t packages < <(missing_packages)
	if [[ ${#packages[@]} -eq 0 ]]; then
		return 0
	fi
	if ! command -v apt-get >/dev/null || [[ $(id -u) -ne 0 ]]; then
		skip "not installed, and this is no root shell with apt-get: ${packages[*]}"
	fi
	say "installing ${packages[*]}"
	export DEBIAN_FRONTEND=noninteractive
	if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null; then
		skip "apt-get could not install ${packages[*]}"
	fi
}

# stale STAMP TEXT: whether STAMP says that something else was built than TEXT, a digest of the inputs.
stale() {
	[[ ! -e $1 || $(<"$1") != "$2" ]]
}

# digest FILE...: one line that changes when a file does.
digest() {
	sha256sum "$@" | sed "s#$ROOT/##" | sha256sum | cut -d' ' -f1
}

# wait_until SECONDS COMMAND...: until it succeeds, and fails after that time.
wait_until() {
	local until=$((SECONDS + $1))
	shift
	until "$@"; do
		[[ $SECONDS -lt $until ]] || return 1
		sleep 0.1
	done
}

# Builds what dom0 gets, unless XL_COLO names one. A build without Xen may stand where this one belongs.
build_xl_colo() {
	[[ -z ${XL_COLO:-} ]] || return 0
	"$ROOT/scripts/install-deps.sh"
	(cd "$ROOT" && cargo build --release --quiet --features xen)
}
