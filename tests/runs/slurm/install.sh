#!/usr/bin/env bash
# Installs Slurm, for the tests in this folder: they start a cluster of their own with it, and leave the machine's alone.
#
#   bash tests/runs/slurm/install.sh
#
# Where that is not possible it says so: the tests skip themselves then.
set -euo pipefail

if command -v slurmctld slurmd munged >/dev/null; then
    exit
fi
if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "No Slurm here, and it cannot be installed without root and apt-get: the tests in tests/runs/slurm will skip."
    exit
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Its services are not to start: the tests start what they need.
policy=/usr/sbin/policy-rc.d
if [[ ! -e "$policy" ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
