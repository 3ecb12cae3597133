#!/usr/bin/env bash
# Run the tests, in several lanes at once. All arguments go to pytest; with --all, the thorough tests run too.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
cd "$project"
exec python3 -m pytest --numprocesses=auto "$@"
