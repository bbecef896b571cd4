"""Whether the nodes of a run find one another: before anything heavy is imported, and with the mistake named."""

import hashlib
import json
import os
import secrets
import select
import selectors
import socket
import time

SECONDS = 60


class Lines:
    """A connection that carries one JSON value a line."""

    def __init__(self, connection):
        self.connection, self.received = connection, b""

    def send(self, value):
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def read(self):
        """The next value, or None if it has not come yet. Raises OSError when the other side is gone, ValueError."""
        if b"\n" not in self.received:
            block = self.connection.recv(65536)
            if not block:
                raise ConnectionError("closed")
            self.received += block
            if len(self.received) > 1 << 20:
                raise ValueError("no line")
        line, newline, rest = self.received.partition(b"\n")
        if not newline:
            return None
        self.received = rest
        return json.loads(line)

    def wait(self, deadline):
        """The next value; TimeoutError at the deadline."""
        while True:
            self.connection.settimeout(max(0.01, deadline - time.monotonic()))
            value = self.read()
            if value is not None:
                return value


def environment_problems(nodes):
    """What is wrong with this node's MASTER_ADDR, MASTER_PORT and NODE_RANK, as far as one node can see."""
    values = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")}
    missing = [name for name, value in values.items() if not value]
    if missing:
        return [
            f"--executor local --num_nodes {nodes}: {' and '.join(missing)} not set; export MASTER_ADDR (of the first "
            "node), MASTER_PORT (free there) and NODE_RANK (0 there, then 1, 2, ...) and run this on every node, "
            "or use --executor slurm"
        ]
    problems = []
    if not values["NODE_RANK"].isdecimal() or int(values["NODE_RANK"]) >= nodes:
        problems.append(
            f"NODE_RANK={values['NODE_RANK']} is not one of 0 to {nodes - 1}, as --num_nodes {nodes} has it"
        )
    if not values["MASTER_PORT"].isdecimal() or not 0 < int(values["MASTER_PORT"]) < 65536:
        problems.append(f"MASTER_PORT={values['MASTER_PORT']} is not a port; use a free one, such as 29500")
    try:
        socket.getaddrinfo(values["MASTER_ADDR"], None)
    except (OSError, UnicodeError) as error:
        problems.append(f"MASTER_ADDR={values['MASTER_ADDR']} is no address that this node knows ({error})")
    return problems


def is_first(args):
    """Whether this launcher does what is done once a run: without Slurm each node has one, and NODE_RANK."""
    return args.executor != "local" or args.num_nodes == 1 or os.environ["NODE_RANK"] == "0"


def meet(facts, nodes, seconds=SECONDS):
    """Wait for all nodes, as MASTER_ADDR, MASTER_PORT and NODE_RANK say; returns their host names, first first.

    `facts` ({name: value}) must be the same on all. Raises ValueError: what is wrong, and on which node.
    """
    address, port, node = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["NODE_RANK"])
    deadline = time.monotonic() + seconds
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    hello = {"node": node, "nodes": nodes, "host": host, "facts": {k: str(v) for k, v in facts.items()}}
    if node == 0:
        return _serve(hello, address, port, deadline, seconds)
    said = f"nothing answers at MASTER_ADDR={address} MASTER_PORT={port}"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((address, port), timeout=min(5, seconds))
        except OSError as error:
            said = f"nothing answers at MASTER_ADDR={address} MASTER_PORT={port} ({error})"
            time.sleep(0.2)
            continue
        with connection:
            lines = Lines(connection)
            try:
                lines.wait(time.monotonic() + 10)  # who is there
                lines.send(hello)
                answer = lines.wait(deadline + 5)
            except (OSError, ValueError):
                said = f"what answers at MASTER_ADDR={address} MASTER_PORT={port} is not node 0 of this run"
                time.sleep(0.5)
                continue
            if answer["problems"]:
                raise ValueError("\n".join(answer["problems"]))
            return answer["hosts"]
    raise ValueError(
        f"node {node} ({host}): {said} within {seconds} s. Is the command running on the node with NODE_RANK=0, is "
        "that its address, and may the port be reached from here?"
    )


def _serve(hello, address, port, deadline, seconds):
    """Node 0: hear the others, tell all of them what is wrong."""
    nodes, own = hello["nodes"], secrets.token_hex(8)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, backlog=nodes + 8)
    except OSError as error:
        raise ValueError(
            f"node 0 ({hello['host']}): MASTER_PORT={port} can't be listened at ({error}); choose a free port, on all "
            "nodes, and start only one node with NODE_RANK=0"
        ) from None
    heard, problems, known = {0: hello}, [], {}
    with server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        found = _is_me(server, selector, known, own, address, port, hello)
        problems += found
        while not problems and len(heard) < nodes and time.monotonic() < deadline:
            for key, _ in selector.select(timeout=0.2):
                if key.fileobj is server:
                    _accept(server, selector, known, own)
                    continue
                lines = known[key.fileobj]
                try:
                    other = lines.read()
                except (OSError, ValueError):
                    selector.unregister(key.fileobj)
                    known.pop(key.fileobj).connection.close()
                    continue
                if other is not None:
                    problems += _against(heard, other, nodes)
                    heard.setdefault(other.get("node"), other)
        missing = [str(number) for number in range(nodes) if number not in heard]
        if not problems and missing:
            there = ", ".join(f"{number} ({heard[number]['host']})" for number in sorted(heard))
            problems.append(
                f"no word within {seconds} s from the node with NODE_RANK={' or '.join(missing)}; here are {there}. Is "
                f"the command running there, with MASTER_ADDR={address} and MASTER_PORT={port}?"
            )
        answer = {"problems": problems, "hosts": [heard[number]["host"] for number in range(nodes) if number in heard]}
        for lines in known.values():
            try:
                lines.connection.settimeout(5)
                lines.send(answer)
            except OSError:
                pass
            lines.connection.close()
    if problems:
        raise ValueError("\n".join(problems))
    return answer["hosts"]


def _accept(server, selector, known, own):
    connection, _ = server.accept()
    lines = Lines(connection)
    connection.settimeout(5)
    try:
        lines.send({"run": own})
    except OSError:
        connection.close()
        return
    known[connection] = lines
    selector.register(connection, selectors.EVENT_READ)


def _is_me(server, selector, known, own, address, port, hello):
    """Whether MASTER_ADDR leads back here: problems."""
    wrong = f"node 0 ({hello['host']}): MASTER_ADDR={address} is not this node's address, but its NODE_RANK is 0"
    try:
        with socket.create_connection((address, port), timeout=10) as connection:
            ready = []
            while connection not in ready:
                if server in ready:  # other nodes may have come first
                    _accept(server, selector, known, own)
                ready = select.select([connection, server], [], [], 1)[0]
                if not ready:
                    return [
                        f"{wrong}; another node answers there, so two have NODE_RANK=0, or the address is another's"
                    ]
            if Lines(connection).wait(time.monotonic() + 5).get("run") != own:
                return [f"{wrong}; another node answers there, so two have NODE_RANK=0"]
    except (OSError, ValueError) as error:
        return [f"{wrong} ({error})"]
    return []


def _against(heard, other, nodes):
    """What is wrong with what a node says, beside what was heard before: problems."""
    first, node, host = heard[0], other.get("node"), other.get("host")
    if other.get("nodes") != nodes:
        return [f"node {node} ({host}) has --num_nodes {other.get('nodes')}, node 0 ({first['host']}) has {nodes}"]
    if node in heard:
        return [
            f"two nodes have NODE_RANK={node}: {heard[node]['host']} and {host}; each needs its own, 0 to {nodes - 1}"
        ]
    differ = [name for name in first["facts"] if other["facts"].get(name) != first["facts"][name]]
    differ += [name for name in other["facts"] if name not in first["facts"]]
    return [
        f"node {node} ({host}) has {name} {other['facts'].get(name)}, node 0 ({first['host']}) has "
        f"{first['facts'].get(name)}: the command must be the same on all nodes"
        for name in differ
    ]


def facts(args):
    """What must be the same on all nodes: the flags, and our code."""
    values = {f"--{name}": value for name, value in vars(args).items() if not name.endswith("_token")}
    folder, digest = os.path.dirname(os.path.abspath(__file__)), hashlib.sha256()
    for name in sorted(name for name in os.listdir(folder) if name.endswith(".py")):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(file.read())
    return {**values, "the code": digest.hexdigest()[:12]}
