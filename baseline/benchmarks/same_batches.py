"""train.py with packed's batches, whatever --batching says of how a batch is laid out.

    python baseline/benchmarks/same_batches.py [options]

paired.py starts it. The options are train.py's, and it leaves what train.py leaves.
"""

import argparse

import measuring

train = measuring.load_train()
plan_own_epoch = train.plan_epoch


def plan_epoch(lengths, args, epoch):
    args_of_packed = argparse.Namespace(**{**vars(args), "batching": "packed"})
    return plan_own_epoch(lengths, args_of_packed, epoch)


if __name__ == "__main__":
    train.plan_epoch = plan_epoch
    train.main()
