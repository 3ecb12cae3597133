# Sourced by the launch scripts: create the virtual environment if it is missing or out of date, and activate it.
# shellcheck shell=bash
project=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VIRTUAL_ENV="$project/.venv"

install_environment() (
    flock 9 # of several launches at once, one installs and the others wait
    stamp=$(cat "$project/pyproject.toml" "$project/constraints.txt" | sha256sum)
    [ "$(cat "$VIRTUAL_ENV/stamp" 2>/dev/null)" = "$stamp" ] && return
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed, $(python3 --version) was found" >&2
        exit 2
    }
    echo "setting up $VIRTUAL_ENV" >&2
    # In place: the user's own packages stay, and running trainings are not disturbed.
    python3 -m venv "$VIRTUAL_ENV" &&
        "$VIRTUAL_ENV/bin/python3" -m pip install --quiet -c "$project/constraints.txt" -e "${project}[test]" &&
        echo "$stamp" >"$VIRTUAL_ENV/stamp"
) 9>"$project/.setup.lock"

install_environment || return
export PATH="$VIRTUAL_ENV/bin:$PATH"
hash -r # forget the cached path of python3

# torchrun takes a closed terminal for a stop request even under nohup, unless it is told not to.
[ -z "$(trap -p HUP)" ] || export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
