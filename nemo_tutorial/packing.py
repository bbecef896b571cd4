"""Which rows of instruction data share a pack, how long a pack is, and how many of them are a step.

Ours, because NeMo's packer takes minutes for 100,000 rows and leaves more empty (benchmarks/packing.py).
All lengths are in tokens as the model reads them: one less than a row has, because its last token is only predicted.
"""

import heapq
import math
import random

MULTIPLE = 16  # of a pack's length; what FP8 needs


def pack(lengths, size, seed):
    """Best fit: each row, in random order, goes into the fullest pack that still has room: [[index, ...], ...].

    Random, though the longest first would leave still less empty: so the packs are alike in rows and in lengths, as
    batches of single rows are. Raises ValueError if a row is longer than `size`.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    packs, open_packs = [], [[] for _ in range(size)]  # open_packs[n]: those with room for n tokens
    rooms = 0  # bit n is set if there are any of these
    for index in order:
        length = lengths[index]
        if length > size:
            raise ValueError(f"a row of {length} tokens does not fit a pack of {size}")
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            number = open_packs[room].pop()
            if not open_packs[room]:
                rooms ^= 1 << room
        else:
            room, number = size, len(packs)
            packs.append([])
        packs[number].append(index)
        room -= length
        if room:
            rooms |= 1 << room
            open_packs[room].append(number)
    return packs


def spread(lengths, size, multiple):
    """Evenly filled packs, so many that whole batches of `multiple` packs hold every row; [] if the rows are too few.

    The longest row goes first, always into the emptiest pack.
    """
    count = math.ceil(math.ceil(sum(lengths) / size) / multiple) * multiple
    while count <= len(lengths):
        packs, fills = [[] for _ in range(count)], [(0, number) for number in range(count)]
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            fill, number = heapq.heappop(fills)
            packs[number].append(index)
            heapq.heappush(fills, (fill + lengths[index], number))
        if max(fills)[0] <= size:
            return packs
        count += multiple
    return []


def pack_size(lengths, longest, rows, ranks, limit, multiple=MULTIPLE, micro_batches=1):
    """Length of the packs with which a step of `ranks` x n packs has about `rows` rows: `longest` to `limit`.

    Not always `limit`: packs of that length could hold more rows in a step than were asked for. `micro_batches` is
    the least n to aim for.
    """
    tokens = rows * sum(lengths) / len(lengths) / ranks  # of one rank in one step
    count = max(math.ceil(tokens / limit), micro_batches)
    size = max(tokens / count, longest)
    return min(limit, math.ceil(size / multiple) * multiple)


def packs_a_step(rows, rows_a_pack, ranks):
    """How many packs are nearest to `rows` rows, the same number for each of `ranks`."""
    return max(1, round(rows / rows_a_pack / ranks)) * ranks
