#!/bin/sh
# Puts skiff on the node whose root file system is at $HOST and registers it with containerd, or takes it away again.
# Runs in the installer's DaemonSet; works with busybox.
#
#   install.sh install | remove
#
# The runtime goes to the end of config.toml itself, between two lines that say so: containerd 1.x would put the CRI table of
# an imported file in the place of the node's own.
set -eu

HOST=${HOST:-/host}
BIN=/usr/local/bin
CONFIG=$HOST/etc/containerd/config.toml
SOURCE=${SOURCE:-/skiff}
BEGIN='# skiff: begin, made by its installer'
END='# skiff: end'

# config.toml as it is without skiff; its last line ends, whatever wrote it.
others() {
    [ ! -e "$CONFIG" ] || sed "/^$BEGIN\$/,/^$END\$/d" "$CONFIG" | awk 1
}

# The version of the configuration: its own, or that of a new one.
version() {
    if others | grep -q '[^[:space:]]'; then
        others | sed -n 's/^version *= *\([0-9]*\).*/\1/p' | head -n 1
    elif chroot "$HOST" containerd --version | grep -q ' v\{0,1\}1\.'; then
        echo 2
    else
        echo 3
    fi
}

block() {
    echo "$BEGIN"
    others | grep -q '[^[:space:]]' || echo "version = $1"
    case $1 in
        2) echo '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.skiff]' ;;
        3) echo '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.skiff]' ;;
        *) echo "$CONFIG is not of version 2 or 3" >&2; return 1 ;;
    esac
    echo '  runtime_type = "io.containerd.skiff.v2"'
    echo "$END"
}

# Puts the new configuration, $CONFIG.skiff, into its place. A restart of containerd leaves pods alone.
replace() {
    if cmp -s "$CONFIG.skiff" "$CONFIG"; then
        rm "$CONFIG.skiff"
        return
    fi
    [ ! -e "$CONFIG" ] || chmod "$(stat -c %a "$CONFIG")" "$CONFIG.skiff"
    mv "$CONFIG.skiff" "$CONFIG"
    chroot "$HOST" systemctl restart containerd
}

install() {
    mkdir -p "$HOST$BIN" "${CONFIG%/*}"
    if others | grep -q 'runtimes\.skiff\]'; then
        echo "$CONFIG has a runtime skiff that this installer has not written: remove it first" >&2
        exit 1
    fi
    added=$(block "$(version)")
    for binary in containerd-shim-skiff-v2 skiff; do
        # A running shim keeps the old file: the new one gets its name.
        cp "$SOURCE/$binary" "$HOST$BIN/.$binary.new"
        chmod 755 "$HOST$BIN/.$binary.new"
        mv "$HOST$BIN/.$binary.new" "$HOST$BIN/$binary"
    done
    { others; echo "$added"; } >"$CONFIG.skiff"
    replace
}

remove() {
    # containerd needs the runtime for all that it does with a pod, and cleans up after one with its shim.
    running=0
    chroot "$HOST" pgrep -f "^$BIN/containerd-shim-skiff-v2 " >/dev/null || running=$?
    case $running in
        0) echo 'pods still run with skiff: it stays until they are gone' >&2; exit 1 ;;
        1) ;;
        *) echo "pgrep on the node ended with $running: whether pods run with skiff is not known" >&2; exit 1 ;;
    esac
    if grep -qx "$BEGIN" "$CONFIG" 2>/dev/null; then
        others >"$CONFIG.skiff"
        replace
    fi
    rm -f "$HOST$BIN/containerd-shim-skiff-v2" "$HOST$BIN/skiff"
}

"$1"
