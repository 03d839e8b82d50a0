"""`python -m tests.generated SEED [BACKEND ...]`: one generated case again, with its architecture."""

import sys

from tests.generated.architectures import draw
from tests.generated.running import problems

if __name__ == "__main__":
    seed, backends = int(sys.argv[1]), sys.argv[2:] or ["fsdp1", "fsdp2"]
    print(draw(seed))
    found = problems([seed], backends)
    print("\n".join(found) or "as the oracle")
    sys.exit(bool(found))
