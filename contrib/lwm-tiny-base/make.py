"""Fill this package's model folder from a finished run: python contrib/lwm-tiny-base/make.py RUN."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from lwm_core.errors import LwmError
from lwm_core.weights import read_model_folder, write_model_folder

MODEL = Path(__file__).with_name("src") / "lwm_tiny_base" / "model"


def main() -> int:
    """Write RUN's model in bfloat16, its configuration and its tokenizer; 1 where RUN holds none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run of the recipe tiny-base-vision")
    parser.add_argument("--out", type=Path, default=MODEL, help="the model folder to write (default: the package's)")
    options = parser.parse_args()
    source: Path = options.run / "model"
    try:
        found = read_model_folder(source)
        write_model_folder(
            options.out, found.model, found.rope, found.seq_len, found.parameters.items(), dtype="bfloat16"
        )
        shutil.copyfile(source / "tokenizer.json", options.out / "tokenizer.json")
    except (LwmError, OSError) as error:
        print(f"make.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
