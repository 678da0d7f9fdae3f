# Sourced by packaging/demo and packaging/check. find_python COMMAND CHECKOUT sets $python to an interpreter that can
# make a virtual environment, or says exactly what is missing and exits with 3.

# Exit codes of the probe: 0 good, 10 wrong version, 11 no venv or ensurepip, 12 not CPython; anything else: cannot run.
probe='
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 14): sys.exit(10)
if sys.implementation.name != "cpython": sys.exit(12)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(11)
'

find_python() {
    command=$1 checkout=$2
    unset PYTHONHOME PYTHONPATH
    case "$(uname -s) $(uname -m)" in
    "Linux x86_64" | "Linux aarch64") ;;
    *) refuse "this is $(uname -s) on $(uname -m); Solocard runs on Linux on x86_64 or aarch64" ;;
    esac
    # An environment that is there already decides the version, so that a new Python on PATH changes nothing.
    if [ -x "$checkout/.venv/bin/python" ] && "$checkout/.venv/bin/python" -I -c "$probe" 2>/dev/null; then
        python=$checkout/.venv/bin/python
        return
    fi
    without_venv='' seen=''
    for name in ${SOLOCARD_PYTHON:-python3.14 python3.13 python3.12 python3.11 python3}; do
        python=$(command -v "$name") || continue
        code=0
        "$python" -I -c "$probe" 2>/dev/null || code=$?
        case $code in
        0) return ;;
        10) seen="$seen, $name is $("$python" -I -c 'import platform; print(platform.python_version())' 2>/dev/null)" ;;
        11) without_venv=${without_venv:-$python} ;;
        12) seen="$seen, $name is not CPython" ;;
        *) seen="$seen, $name does not run" ;;
        esac
    done
    [ -z "$without_venv" ] || refuse_venv "$without_venv"
    refuse "no Python from 3.11 to 3.14 was found${SOLOCARD_PYTHON:+ by SOLOCARD_PYTHON=$SOLOCARD_PYTHON}" \
        "(found: ${seen:-, no python3 at all})" "install it: $(package_of interpreter "")"
}

refuse_venv() {
    version=$("$1" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    refuse "$1 cannot make a virtual environment: its venv module is missing" \
        "install it: $(package_of venv "$version")"
}

refuse() {
    printf '%s: %s\n' "$command" "$1" >&2
    shift
    for line in "$@"; do printf '  %s\n' "$line" | sed 's/(found: , /(found: /' >&2; done
    exit 3
}

# The command that installs an interpreter, or its venv module, on this distribution.
package_of() {
    distribution=$(sed -n 's/^ID\(_LIKE\)\{0,1\}=//p' "${SOLOCARD_OS_RELEASE:-/etc/os-release}" 2>/dev/null | tr -d '"' | tr '\n' ' ')
    case " $distribution " in
    *" debian "* | *" ubuntu "*)
        if [ "$1" = venv ]; then echo "apt-get install python$2-venv"; else echo "apt-get install python3 python3-venv"; fi ;;
    *" openeuler "* | *" openEuler "*) echo "dnf install python3" ;;
    *" fedora "* | *" rhel "* | *" centos "*) echo "dnf install python${2:-3.12}" ;;
    *" suse "* | *" opensuse "*) echo "zypper install python3${2#3.}" | sed 's/python3$/python312/' ;;
    *" arch "*) echo "pacman -S python" ;;
    *) if [ "$1" = venv ]; then echo "the venv module of Python $2 (on Debian and Ubuntu: python$2-venv)"
       else echo "CPython 3.12 with its venv module, from your distribution"; fi ;;
    esac
}
