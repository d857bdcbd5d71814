"""A spare training process waits beside a vLLM that needs the device: it must hold none of it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

WARM = """
import torch

def touched(*_):
    raise SystemExit("the imports made a CUDA context, which holds hundreds of MB of the device")

# as on a machine with a GPU: whatever asks is told that there is one, and whatever touches it is caught
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda._lazy_init = touched
from services.trainer.child import UNUSED_LIBRARIES, warm_up
import sys
for name in UNUSED_LIBRARIES:
    sys.modules.setdefault(name, None)
warm_up()
print("warm")
if len(sys.argv) > 1:
    torch.zeros(1, device="cuda")
"""


@pytest.mark.parametrize(("arguments", "told"), [((), ""), (("touch",), "made a CUDA context")])
def test_the_imports_of_a_spare_process_do_not_touch_the_device(arguments: tuple[str, ...], told: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WARM, *arguments], cwd=root, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["warm"], done.stderr[-2000:]
    assert (done.returncode == 0) == (not told), done.stderr[-2000:]
    assert told in done.stderr
