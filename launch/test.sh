#!/usr/bin/env bash
# Run the tests. All arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
cd "$project"
exec python3 -m pytest "$@"
