# Sourced by the other scripts: an environment with distpro in it. $PYTHON names the interpreter to make it with.
_install() { # quietly: of what pip has to say, the errors
    local said
    if ! said=$(python -m pip install --quiet --disable-pip-version-check "$@" 2>&1); then
        printf '%s\n' "$said" >&2
        return 1
    fi
}

if [ -n "${VIRTUAL_ENV:-}" ] && python -c "import distpro, pytest" 2>/dev/null; then
    echo "using the active environment $VIRTUAL_ENV"
else
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv (PyTorch is a download of some GB; once)"
        "${PYTHON:-python3}" -m venv .venv
    fi
    source .venv/bin/activate
    if ! python -c "import distpro, pytest, sklearn, hypothesis, xdist, sphinx, onnx, onnxruntime" 2>/dev/null; then
        _install --upgrade pip
        _install -e '.[demo,dev]'
    fi
fi
