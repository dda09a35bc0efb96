#!/usr/bin/env bash
# Installs Debian's chromium, headless and with its driver, for the tests of pages in this folder.
#
#   bash tests/report/install.sh
#
# Where that is not possible it says so: the tests skip themselves then.
set -euo pipefail

if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    exit
fi
if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "No chromium here, and it cannot be installed without root and apt-get: the tests that need it will skip."
    exit
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core; } \
    >/dev/null || echo "chromium cannot be installed: the tests that need it will skip."
