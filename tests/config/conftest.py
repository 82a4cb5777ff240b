import pytest


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="run.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return to_file
