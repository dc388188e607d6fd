"""A script whose work is done by processes of its own, started afresh: they import it by its path."""

import multiprocessing


def double(number):
    return 2 * number


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(pool.map(double, range(4)))
