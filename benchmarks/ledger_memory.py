"""What the ledger keeps in memory while its database grows: `python -m benchmarks.ledger_memory`.

The writer and its audits on a SQLite file in this process. One JSON line: resident MiB more than at the start after
each round of rollouts, and the file's size beside it. What is kept is bounded by caches: the last rounds add nothing.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil

from billing.auditor import Auditor
from billing.commands import CreateKey, Reserve, Settle
from billing.database import migrate, open_database
from billing.keys import mint_customer_id, mint_key_id, mint_request_id, mint_token, token_sha256
from billing.ledger import Ledger
from billing.money import Mils
from billing.writer import collect_rarely

BATCH = 128
PRICE = Mils(5)


def grow(directory: Path, rounds: int, rollouts: int) -> list[dict[str, float]]:
    file = directory / "ledger.db"
    url = f"sqlite:///{file}"
    database = open_database(url)
    migrate(database)
    ledger = Ledger(database, time.time)
    ledger.take_over()
    collect_rarely()
    key_id, token = mint_key_id(), mint_token()
    balance = Mils(PRICE * 49 * rounds * (rollouts + BATCH))
    ledger.apply(
        [CreateKey(key_id, token_sha256(token), token[-4:], "customer", mint_customer_id(), balance, 1.0, burst=1)]
    )
    auditor = Auditor(url, lambda report: None)
    process = psutil.Process()
    before, measured, done = process.memory_info().rss, [], 0
    for end in range(rollouts, rollouts * (rounds + 1), rollouts):
        while done < end:
            ids = [mint_request_id() for _ in range(BATCH)]
            ledger.apply(
                [
                    Reserve(
                        request_id=request_id,
                        key_id=key_id,
                        frames=49,
                        mils_per_frame=PRICE,
                        per_frames=1,
                        detail="predict",
                        lease_s=30.0,
                        payload_sha256=token_sha256(request_id),
                        dedupe_window_s=60.0,
                        model="tiny-pusher",
                    )
                    for request_id in ids
                ]
            )
            ledger.apply([Settle(request_id, 49, "") for request_id in ids])
            done += BATCH
        assert auditor.round().ok
        measured.append(
            {
                "rollouts": done,
                "grown_mib": round((process.memory_info().rss - before) / 2**20, 1),
                "file_mib": round(file.stat().st_size / 2**20, 1),
            }
        )
    ledger.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=50_000, help="in each round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ledger-memory-") as directory:
        measured = grow(Path(directory), arguments.rounds, arguments.rollouts)
    print(json.dumps({"benchmark": "ledger_memory", "rounds": measured}))


if __name__ == "__main__":
    main()
