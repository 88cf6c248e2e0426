"""How long does `import eellm` take, beyond a bare interpreter that imports NumPy?

python benchmarks/bench_import.py [--json FILE] [--turns N]
"""

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import ROOT, arguments, median, record, report

METRIC = "import_seconds"


def seconds(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - start


def main():
    options = arguments(__doc__.splitlines()[0], [METRIC])
    seconds("import numpy, eellm")  # byte code and page cache
    values = []
    for _ in range(options.turns or 15):
        bare = seconds("import numpy")
        values.append(seconds("import numpy, eellm") - bare)
    records = [record(METRIC, median(values), "s", values, config=json.dumps({}))]
    report(records, options.json)


if __name__ == "__main__":
    main()
