"""The same script with the one line that we ask for."""

import runpy
from pathlib import Path

import ds_compress  # noqa: F401
from tests.ending import end

runpy.run_path(str(Path(__file__).with_name("user_script.py")), run_name="__main__")
end()
