#!/bin/sh
# One node of the private cluster (slurm_cluster.py starts it): sets up what the node has of its own, then runs slurmd.
#
#   node.sh CLUSTER_FOLDER NODE [ADDRESS]
#
# With an address it is process 1 of its own network, mount, host name, IPC and process namespaces; killing it is a
# power loss. Without one it shares everything with this machine.
set -eu
folder=$1 node=$2 address=${3:-}

if [ -n "$address" ]; then
    mount --make-rprivate /
    # Names come from one file and never from DNS: torch looks names up on every connection, and DNS would time out.
    mount --bind "$folder/hosts" /etc/hosts
    [ ! -e /etc/nsswitch.conf ] || mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
    hostname "$node"
    mount -t tmpfs -o mode=1777 shm /dev/shm
    mkdir -p "$folder/spool/$node/scratch"
    mount --bind "$folder/spool/$node/scratch" "$folder/scratch" # the node's own disk
    tries=0
    until ip link show eth0 >/dev/null 2>&1; do # the other end of the cable is put in from outside
        tries=$((tries + 1))
        [ $tries -lt 200 ] || exit 1
        sleep 0.05
    done
    ip link set lo up
    ip addr add "$address/24" dev eth0
    ip link set eth0 up
fi

# slurmd becomes a child, not process 1, so that the shell reaps what jobs leave behind.
slurmd -D -f "$SLURM_CONF" -N "$node" &
daemon=$!
trap 'kill -TERM $daemon' TERM INT
while kill -0 $daemon 2>/dev/null; do wait $daemon || true; done
