"""Measures what the ranks can send to each other, then becomes the script that follows:

    torchrun ... DISTRIBUTED/all_reduce.py [DISTRIBUTED/train.py ITS OPTIONS]

A gradient goes through an all-reduce at every step, so this bandwidth decides what more ranks are
worth. It is nccl-tests' "bus bandwidth": bytes / seconds x 2 (ranks - 1) / ranks, which is what the
slowest link carries. Printed by rank 0, and left to results.json through ALL_REDUCE.
"""

import fcntl, json, os, re, runpy, socket, struct, sys, tempfile, time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

RANK, LOCAL, WORLD = (int(os.environ.get(n, "0")) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def interface():
    """gloo listens where the node's own name leads to, unless GLOO_SOCKET_IFNAME says another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:  # 0x8915 asks for an interface's address
                asked = fcntl.ioctl(any_socket, 0x8915, struct.pack("256s", name[:15].encode()))
                if socket.inet_ntoa(asked[20:24]) == socket.gethostbyname(socket.gethostname()):
                    return name
            except OSError:  # it has no address
                continue
    return "lo"


def measure():
    cuda = torch.cuda.is_available() and not {"cpu", "--device=cpu"} & {*sys.argv}
    device = torch.device("cuda", LOCAL) if cuda else torch.device("cpu")
    beside = Path(os.environ.get("EXIT_CODE_FILE") or tempfile.gettempdir() + "/any")  # the job's
    told = beside.with_name(f"nccl-{RANK}-{os.getpid()}")  # kept: NCCL warns there to its end
    if cuda:  # NCCL tells how it connects only in its log
        torch.cuda.set_device(device)
        own = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET,P2P"}
        os.environ |= own | {"NCCL_DEBUG_FILE": str(told)} if "NCCL_DEBUG" not in os.environ else {}
    store = next(dist.rendezvous("env://"))[0]
    store = dist.PrefixStore("all_reduce", store)  # train.py's is whole
    how = {"store": store, "rank": RANK, "world_size": WORLD, "timeout": timedelta(seconds=150)}
    how |= {"device_id": device} if cuda else {}
    dist.init_process_group("nccl" if cuda else "gloo", **how)
    for megabytes in (1, 8, 64):  # larger ones only where they are quick
        values, seconds = torch.zeros(megabytes * 2**18, device=device), []
        for _ in range(4):  # the first connects
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(values)
            values[:1].tolist()  # waits for it
            seconds.append(time.perf_counter() - begin)
        slowest = torch.tensor(min(seconds[1:]), device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if slowest > 0.2:
            break
    links = set(re.findall(r"via (NET/\w+|P2P|SHM)", told.read_text())) if told.exists() else set()
    if not cuda:
        links = {f"gloo on {os.environ.get('GLOO_SOCKET_IFNAME') or interface()}"}
    every = [None] * WORLD
    dist.all_gather_object(every, sorted(links))
    dist.destroy_process_group()
    speed = megabytes * 2**20 * 2 * (WORLD - 1) / WORLD / slowest.item() / 1e9
    link = ", ".join(sorted({one for links in every for one in links})) or "not told"
    return {"gigabytes_per_second": round(speed, 3), "megabytes": megabytes, "link": link}


if __name__ == "__main__":
    try:
        if WORLD > 1:
            found = measure()
            os.environ["ALL_REDUCE"] = json.dumps(found)
            if RANK == 0:
                rate, size = found["gigabytes_per_second"], found["megabytes"]
                print(f"all-reduce of {size} MiB: {rate} GB/s, by {found['link']}", flush=True)
    except Exception as error:  # noqa: BLE001 the training says better what is wrong
        print(f"rank {RANK}: the all-reduce is not measured ({error})", file=sys.stderr, flush=True)
        if dist.is_initialized():  # NCCL fails after the start, and would leave its group behind
            dist.destroy_process_group()
    sys.argv = sys.argv[1:]
    if sys.argv:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
