"""Does Megatron-Core find all that it uses of the installed Transformer Engine? Prints JSON, for the doctor.

python -m gspo_megatron.mcore.try_te
"""

from __future__ import annotations

import json

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.mcore import compat


def look() -> dict[str, str]:
    try:
        compat.check_transformer_engine()
    except ConfigError as error:
        return {"error": str(error)}
    return {}


if __name__ == "__main__":
    print(json.dumps(look()))
