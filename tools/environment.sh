# Sourced by the other scripts: an environment with distpro in it. $PYTHON names the interpreter to make it with.
if [ -n "${VIRTUAL_ENV:-}" ] && python -c "import distpro, pytest" 2>/dev/null; then
    echo "using the active environment $VIRTUAL_ENV"
else
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv (PyTorch is a download of some GB; once)"
        "${PYTHON:-python3}" -m venv .venv
    fi
    source .venv/bin/activate
    if ! python -c "import distpro, pytest, sklearn" 2>/dev/null; then
        python -m pip install --quiet --upgrade pip
        python -m pip install --quiet -e '.[demo,dev]'
    fi
fi
