#!/bin/sh
# Puts skiff on the node whose root file system is at $HOST and registers it with containerd, or takes it away again.
# Runs in the installer's DaemonSet; works with busybox.
#
#   install.sh install | remove
set -eu

HOST=${HOST:-/host}
BIN=$HOST/usr/local/bin
DROPIN=$HOST/etc/containerd/conf.d/50-skiff.toml
CONFIG=$HOST/etc/containerd/config.toml
SOURCE=${SOURCE:-/skiff}

restart() {
    chroot "$HOST" systemctl restart containerd
}

plugin() {
    # containerd 2 writes version = 3, and 1.x version = 2.
    if grep -qE '^version *= *3' "$CONFIG" 2>/dev/null || chroot "$HOST" containerd --version | grep -q ' v\?2\.'; then
        echo 'io.containerd.cri.v1.runtime 3'
    else
        echo 'io.containerd.grpc.v1.cri 2'
    fi
}

install() {
    mkdir -p "$BIN" "${DROPIN%/*}"
    for binary in containerd-shim-skiff-v2 skiff; do
        # A running shim keeps the old file: the new one gets its name.
        cp "$SOURCE/$binary" "$BIN/.$binary.new"
        chmod 755 "$BIN/.$binary.new"
        mv "$BIN/.$binary.new" "$BIN/$binary"
    done
    set -- $(plugin)
    if [ ! -s "$CONFIG" ]; then
        printf 'version = %s\nimports = ["/etc/containerd/conf.d/*.toml"]\n' "$2" >"$CONFIG"
    elif ! grep -q 'conf.d/\*.toml' "$CONFIG"; then
        if grep -q '^imports' "$CONFIG"; then
            echo "add \"/etc/containerd/conf.d/*.toml\" to imports in $CONFIG" >&2
            exit 1
        fi
        # At the top: after a table's header it would belong to the table.
        { echo 'imports = ["/etc/containerd/conf.d/*.toml"] # skiff'; cat "$CONFIG"; } >"$CONFIG.skiff"
        mv "$CONFIG.skiff" "$CONFIG"
    fi
    printf 'version = %s\n[plugins."%s".containerd.runtimes.skiff]\n  runtime_type = "io.containerd.skiff.v2"\n' "$2" "$1" \
        >"$DROPIN.new"
    if cmp -s "$DROPIN.new" "$DROPIN"; then
        rm "$DROPIN.new"
    else
        mv "$DROPIN.new" "$DROPIN"
        restart
    fi
}

remove() {
    rm -f "$DROPIN"
    sed -i '/^imports = .* # skiff$/d' "$CONFIG"
    restart
    # Shims of pods that still run need no file of theirs, but their cleanup does.
    if chroot "$HOST" pgrep -f containerd-shim-skiff-v2 >/dev/null; then
        echo 'pods still run with skiff: its programs stay until they are gone' >&2
    else
        rm -f "$BIN/containerd-shim-skiff-v2" "$BIN/skiff"
    fi
}

"$1"
