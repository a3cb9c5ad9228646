"""Beyond one GPU: the loop of azr.py on every rank, with TRL's GRPOTrainer on accelerate below it (docs/scale.md).

spread.py: work divided over ranks; trainer.py: the update; run.py: the command. Nothing else imports this room.
"""

import os

if os.environ.get("RANK", "0") != "0":  # before tqdm is imported: one rank has the terminal
    os.environ["TQDM_DISABLE"] = "1"
