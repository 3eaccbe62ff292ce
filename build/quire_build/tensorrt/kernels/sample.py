"""Sampling: the next token of each row of logits, as `quire.execution.sampler` defines it.

Several programs look for the best logit of a row; the one that finishes last goes on alone. A greedy row is
done then. Any other is drawn without sorting the vocabulary: top_k, top_p and the draw itself each ask how
far down the descending order a count or a mass reaches. A pass over the row measures it at three places,
until few enough candidates remain between two of them; those are copied out, and bisected.

Candidates are ordered by their distance below the best logit, divided by the temperature: the bits of a
float32 that is not negative are ordered as its value is, so the distance serves as an integer key. Masses are
fixed-point integers, MASS_UNIT to the weight of the best, from float32 partial sums whose order the
vocabulary alone decides: neither the batch nor the number of programs changes a token.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire_build.tensorrt.kernels.step_size import ROWS, used

MASS_UNIT = tl.constexpr(float(1 << 38))
"""Mass of a candidate that is as likely as the best."""
COUNT_BITS = tl.constexpr(12)
"""Room for the count of copied candidates below their mass, which together fit an int64."""
COUNT_MASK = tl.constexpr((1 << 12) - 1)
LAST_KEY = tl.constexpr(0x7F800000)
"""Key of a token whose logit is minus infinity."""
NEAR_KEY = tl.constexpr(0x40000000)
"""Key of the distance 2; with FAR_KEY, where the first pass measures."""
FAR_KEY = tl.constexpr(0x41000000)
"""Key of the distance 8."""
FARTHEST = tl.constexpr(64.0)
"""Distance beyond which nothing has a mass."""
STEPS_BY_DISTANCE = tl.constexpr(12)
"""Halvings of an interval by distance; candidates are spread more evenly over it than over keys."""
STEPS_WITHOUT_EXTENT = tl.constexpr(8)
"""Halvings of the interval in passes over the row, two in each, before ties are suspected."""
COPY_BLOCK = tl.constexpr(8192)
"""Tokens looked at together where candidates are copied out; unlike BLOCK and CAPACITY, or the compiler gives
the tensors here the layout that suits those."""
SAMPLING_WIDTH = tl.constexpr(5)


@triton.jit
def _load(row_logits, token, OTHER: tl.constexpr, VOCAB_SIZE: tl.constexpr):
    """Logits of some tokens, OTHER outside the vocabulary."""
    return tl.load(row_logits + token, mask=token < VOCAB_SIZE, other=OTHER)


@triton.jit
def _measure(
    row_logits, best, inverse_temperature, first, second, third, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Count and mass of the tokens up to each of three keys, of which only the first may be LAST_KEY."""
    # A slot sees at most one token in each block: its three counts share an integer.
    tl.static_assert(VOCAB_SIZE // BLOCK < 1023)
    counts = tl.zeros([BLOCK], tl.int32)
    first_mass = tl.zeros([BLOCK], tl.float32)
    second_mass = tl.zeros([BLOCK], tl.float32)
    third_mass = tl.zeros([BLOCK], tl.float32)
    slot = tl.arange(0, BLOCK)
    logit = _load(row_logits, slot, float("-inf"), VOCAB_SIZE)
    for start in range(0, VOCAB_SIZE, BLOCK):
        following = _load(row_logits, start + BLOCK + slot, float("-inf"), VOCAB_SIZE)
        distance = (best - logit) * inverse_temperature
        key = distance.to(tl.int32, bitcast=True)
        weight = tl.exp(-distance)
        counts += tl.where(key <= first, 1, 0)
        counts += tl.where(key <= second, 1 << 10, 0)
        counts += tl.where(key <= third, 1 << 20, 0)
        first_mass += tl.where(key <= first, weight, 0.0)
        second_mass += tl.where(key <= second, weight, 0.0)
        third_mass += tl.where(key <= third, weight, 0.0)
        logit = following
    first_count = tl.sum(counts & 1023)
    return (
        tl.where(first == LAST_KEY, VOCAB_SIZE, first_count).to(tl.int64),
        tl.sum((counts >> 10) & 1023).to(tl.int64),
        tl.sum(counts >> 20).to(tl.int64),
        tl.sum((first_mass * MASS_UNIT).to(tl.int64)),
        tl.sum((second_mass * MASS_UNIT).to(tl.int64)),
        tl.sum((third_mass * MASS_UNIT).to(tl.int64)),
    )


@triton.jit
def _copy_candidates(
    row_logits,
    best,
    inverse_temperature,
    above,
    last,
    candidates,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Copy the tokens whose key is in (above, last] out, a key above its id in each int64.

    First each slot counts its own; then it knows where they go, and no slot waits for another.
    Threads take single tokens, as the scattered stores need it: else all would be exchanged at each block.
    """
    slot = tl.arange(0, BLOCK)
    held = tl.zeros([BLOCK], tl.int32)
    logit = _load(
        row_logits, tl.max_contiguous(slot, 1), float("inf"), VOCAB_SIZE
    )  # whose distance has a negative key
    for start in range(0, VOCAB_SIZE, BLOCK):
        following = _load(row_logits, tl.max_contiguous(start + BLOCK + slot, 1), float("inf"), VOCAB_SIZE)
        key = ((best - logit) * inverse_temperature).to(tl.int32, bitcast=True)
        held += tl.where((key > above) & (key <= last), 1, 0)
        logit = following
    place = tl.cumsum(held, 0) - held
    logit = _load(row_logits, tl.max_contiguous(slot, 1), float("inf"), VOCAB_SIZE)
    for start in range(0, VOCAB_SIZE, BLOCK):
        following = _load(row_logits, tl.max_contiguous(start + BLOCK + slot, 1), float("inf"), VOCAB_SIZE)
        key = ((best - logit) * inverse_temperature).to(tl.int32, bitcast=True)
        chosen = (key > above) & (key <= last) & (place < CAPACITY)
        tl.store(candidates + place, (key.to(tl.int64) << 32) | (start + slot), mask=chosen)
        place += tl.where(chosen, 1, 0)
        logit = following
    tl.debug_barrier()  # what some threads wrote, others read


@triton.jit
def _extent(
    row_logits, best, inverse_temperature, above, last, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """The least and the greatest key in (above, last], where there is one."""
    slot = tl.arange(0, BLOCK)
    least = tl.full([BLOCK], LAST_KEY, tl.int32)
    greatest = tl.full([BLOCK], 0, tl.int32)
    logit = _load(row_logits, slot, float("inf"), VOCAB_SIZE)
    for start in range(0, VOCAB_SIZE, BLOCK):
        following = _load(row_logits, start + BLOCK + slot, float("inf"), VOCAB_SIZE)
        key = ((best - logit) * inverse_temperature).to(tl.int32, bitcast=True)
        inside = (key > above) & (key <= last)
        least = tl.minimum(least, tl.where(inside, key, LAST_KEY))
        greatest = tl.maximum(greatest, tl.where(inside, key, 0))
        logit = following
    return tl.min(least), tl.max(greatest)


@triton.jit
def _candidates(candidates, place, count):
    """Keys and ids of the candidates copied out; beyond their count the key is above LAST_KEY."""
    both = tl.load(candidates + place, mask=place < count, other=-1, cache_modifier=".cg")
    return tl.where(place < count, (both >> 32).to(tl.int32), LAST_KEY + 1), both.to(tl.int32)


@triton.jit
def _middle(above, last, steps):
    """A key inside (above, last): halfway by distance at first, later by key, which is sure to end."""
    middle = above + (last - above) // 2
    if steps < STEPS_BY_DISTANCE:
        begin = tl.maximum(above, 0).to(tl.float32, bitcast=True)
        end = tl.minimum(last.to(tl.float32, bitcast=True), FARTHEST)
        middle = (0.5 * (begin + end)).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(middle, above + 1), last - 1)


@triton.jit
def _narrow(above, above_count, above_mass, last, count, key, key_count, key_mass, by_count, wanted):
    """Cut the interval (above, last] at a key inside it, so that `wanted` is still reached in it."""
    inside = (key > above) & (key < last)
    reached = tl.where(by_count, key_count, key_mass) >= wanted
    short = inside & (reached == 0)
    reached = inside & reached
    return (
        tl.where(short, key, above),
        tl.where(short, key_count, above_count),
        tl.where(short, key_mass, above_mass),
        tl.where(reached, key, last),
        tl.where(reached, key_count, count),
    )


@triton.jit
def _nth_of_key(
    row_logits, best, inverse_temperature, key, nth, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """The token of a key that `nth` tokens of smaller id precede; VOCAB_SIZE if there is none."""
    slot = tl.arange(0, BLOCK)
    seen = 0
    start = 0
    found = VOCAB_SIZE
    while (start < VOCAB_SIZE) & (found == VOCAB_SIZE):
        token = start + slot
        logit = _load(row_logits, token, float("inf"), VOCAB_SIZE)
        equal = ((best - logit) * inverse_temperature).to(tl.int32, bitcast=True) == key
        here = tl.cumsum(equal.to(tl.int32), 0)
        found = tl.min(tl.where(equal & (seen + here == nth + 1), token, VOCAB_SIZE))
        seen += tl.sum(equal.to(tl.int32))
        start += BLOCK
    return found


@triton.jit
def _draw(
    row_logits,
    best,
    best_id,
    inverse_temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    candidates,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Draw a token of one row whose best logit is finite and whose inverse temperature is positive."""
    # Whatever the parameters hold, what they mean from here on is within bounds.
    inverse_temperature = tl.minimum(inverse_temperature, 1e30)
    last_key = tl.full([], LAST_KEY, tl.int32)
    if min_p > 0.0:
        distance = tl.maximum(0.0 - tl.log(tl.minimum(min_p, 1.0)), 0.0)
        last_key = distance.to(tl.int32, bitcast=True)
    most = tl.full([], VOCAB_SIZE, tl.int64)
    if (top_k >= 1.0) & (top_k < VOCAB_SIZE):
        most = top_k.to(tl.int64)
    nucleus = tl.full([], 1.0, tl.float32)
    if top_p < 1.0:
        nucleus = tl.maximum(top_p, 0.0)
    point = tl.full([], 0.0, tl.float32)
    if uniform > 0.0:
        point = tl.minimum(uniform, 1.0)

    near_key = tl.full([], NEAR_KEY, tl.int32)
    far_key = tl.full([], FAR_KEY, tl.int32)
    last_count, near_count, far_count, last_mass, near_mass, far_mass = _measure(
        row_logits, best, inverse_temperature, last_key, near_key, far_key, VOCAB_SIZE, BLOCK
    )
    kept_count, kept_mass = last_count, last_mass
    place = tl.arange(0, CAPACITY)
    copied_count = tl.full([], 0, tl.int64)
    copied_above = tl.full([], -1, tl.int32)
    before_copied_count = tl.full([], 0, tl.int64)
    before_copied_mass = tl.full([], 0, tl.int64)
    nth = tl.full([], 0, tl.int64)
    found_copied = False
    for stage in range(3):
        # top_k, top_p, the draw: the first key up to which `wanted` candidates, or so much mass, are found.
        by_count = stage == 0
        wanted = most
        needed = most < kept_count
        if stage == 1:
            exact = nucleus.to(tl.float64) * kept_mass.to(tl.float64)
            wanted = exact.to(tl.int64)
            if wanted.to(tl.float64) < exact:
                wanted += 1
            needed = nucleus < 1.0
        if stage == 2:
            wanted = (point.to(tl.float64) * kept_mass.to(tl.float64)).to(tl.int64) + 1
            needed = True
        if stage > 0:
            wanted = tl.minimum(tl.maximum(wanted, 1), kept_mass)
        if needed:
            # At `above` less than wanted has been found, at `last` enough.
            above = tl.full([], -1, tl.int32)
            above_count = tl.full([], 0, tl.int64)
            above_mass = tl.full([], 0, tl.int64)
            last, count = last_key, last_count
            above, above_count, above_mass, last, count = _narrow(
                above, above_count, above_mass, last, count, near_key, near_count, near_mass, by_count, wanted
            )
            above, above_count, above_mass, last, count = _narrow(
                above, above_count, above_mass, last, count, far_key, far_count, far_mass, by_count, wanted
            )
            before_copied = tl.where(by_count, before_copied_count, before_copied_mass)
            found_copied = (copied_count > 0) & (before_copied < wanted)
            if not found_copied:
                passes = 0
                while (last - above > 1) & (count - above_count > CAPACITY):
                    if passes >= STEPS_WITHOUT_EXTENT:
                        # So many in so short an interval have few keys, perhaps one.
                        nearest, last = _extent(
                            row_logits, best, inverse_temperature, above, last, VOCAB_SIZE, BLOCK
                        )
                        above = nearest - 1
                    if last - above > 1:
                        second = _middle(above, last, passes)
                        first = tl.minimum(_middle(above, tl.maximum(second, above + 2), passes), second)
                        third = tl.maximum(_middle(tl.minimum(second, last - 2), last, passes), second)
                        count_1, count_2, count_3, mass_1, mass_2, mass_3 = _measure(
                            row_logits, best, inverse_temperature, first, second, third, VOCAB_SIZE, BLOCK
                        )
                        above, above_count, above_mass, last, count = _narrow(
                            above,
                            above_count,
                            above_mass,
                            last,
                            count,
                            first,
                            count_1,
                            mass_1,
                            by_count,
                            wanted,
                        )
                        above, above_count, above_mass, last, count = _narrow(
                            above,
                            above_count,
                            above_mass,
                            last,
                            count,
                            second,
                            count_2,
                            mass_2,
                            by_count,
                            wanted,
                        )
                        above, above_count, above_mass, last, count = _narrow(
                            above,
                            above_count,
                            above_mass,
                            last,
                            count,
                            third,
                            count_3,
                            mass_3,
                            by_count,
                            wanted,
                        )
                    passes += 2
                if last - above > 1:
                    # Where there is room, with all that precede them: later stages look among those.
                    copied_above, before_copied_count, before_copied_mass = above, above_count, above_mass
                    if count <= CAPACITY:
                        copied_above = -1
                        before_copied_count = tl.full([], 0, tl.int64)
                        before_copied_mass = tl.full([], 0, tl.int64)
                    tl.debug_barrier()  # the candidates before are no longer read
                    _copy_candidates(
                        row_logits, best, inverse_temperature, copied_above, last, candidates,
                        VOCAB_SIZE, COPY_BLOCK, CAPACITY,
                    )  # fmt: skip
                    copied_count = count - before_copied_count
                    found_copied = True

            key = last
            before_count, before_mass, equal_count = above_count, above_mass, count - above_count
            if found_copied:
                candidate, _ = _candidates(candidates, place, copied_count)
                weight = tl.exp(0.0 - tl.minimum(candidate, LAST_KEY).to(tl.float32, bitcast=True))
                masses = (weight * MASS_UNIT).to(tl.int64)
                packed = tl.where(place < copied_count, (masses << COUNT_BITS) + 1, 0)
                above = tl.maximum(above, copied_above)
                above_count = tl.sum(tl.where(candidate <= above, 1, 0).to(tl.int64))
                count = tl.sum(tl.where(candidate <= last, 1, 0).to(tl.int64))
                steps = 0
                while (last - above > 1) & (count - above_count > 1):
                    middle = _middle(above, last, steps)
                    reached = tl.sum(tl.where(candidate <= middle, packed, 0))
                    reached_count = reached & COUNT_MASK
                    reached_mass = before_copied_mass + (reached >> COUNT_BITS)
                    if tl.where(by_count, before_copied_count + reached_count, reached_mass) >= wanted:
                        last, count = middle, reached_count
                    else:
                        above, above_count = middle, reached_count
                    steps += 1
                # The one candidate that is left, or all those of one key.
                key = tl.max(tl.where(candidate <= last, candidate, -1))
                before_count = before_copied_count + tl.sum(tl.where(candidate < key, 1, 0).to(tl.int64))
                before_mass = before_copied_mass + tl.sum(tl.where(candidate < key, masses, 0))
                equal_count = tl.sum(tl.where(candidate == key, 1, 0).to(tl.int64))

            each = (tl.exp(0.0 - key.to(tl.float32, bitcast=True)) * MASS_UNIT).to(tl.int64)
            equals = wanted - before_count
            if stage > 0:
                equals = (wanted - before_mass + tl.maximum(each, 1) - 1) // tl.maximum(each, 1)
            equals = tl.maximum(tl.minimum(equals, equal_count), 1)
            kept_count = tl.minimum(before_count + equals, kept_count)
            kept_mass = before_mass + equals * each
            last_key, last_count, last_mass = (
                key,
                before_count + equal_count,
                before_mass + equal_count * each,
            )
            nth = equals - 1

    drawn = tl.full([], VOCAB_SIZE, tl.int32)
    if found_copied:
        keys, ids = _candidates(candidates, place, copied_count)
        ids = tl.where(keys == last_key, ids, VOCAB_SIZE)
        drawn = tl.min(ids)
        if nth > 0:
            # Copied in no order: the smallest id up to which there are nth + 1 of them.
            below = tl.full([], -1, tl.int32)
            drawn = tl.full([], VOCAB_SIZE - 1, tl.int32)
            while drawn - below > 1:
                middle = (below + drawn) // 2
                if tl.sum(tl.where(ids <= middle, 1, 0)) > nth:
                    drawn = middle
                else:
                    below = middle
    else:
        drawn = _nth_of_key(row_logits, best, inverse_temperature, last_key, nth, VOCAB_SIZE, BLOCK)
    return tl.where((drawn >= 0) & (drawn < VOCAB_SIZE), drawn, best_id)


@triton.jit(do_not_specialize=["num_splits"])
def sample(
    logits,
    sampling,
    engine_state,
    num_splits,
    sampled_ids,
    scratch,
    VOCAB_SIZE: tl.constexpr,
    MAX_NUM_SEQS: tl.constexpr,
    COUNTERS_OFFSET: tl.constexpr,
    SAMPLED_IDS_OFFSET: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Choose the next token of one row, or help to find its best logit.

    Grid: (num_splits, N).

    Args:
        logits: float32 [N, VOCAB_SIZE].
        sampling: float32 [N, 5]: inverse temperature (0 is greedy), top_k (0 keeps all), top_p, min_p and a
            uniform number in [0, 1).
        engine_state: says how many rows the step has, lends each a zero counter, keeps what is sampled.
        num_splits: programs that share a row, at most MOST_SPLITS.
        sampled_ids: out, int32 [N]; -1 where the best logit is not a finite number.
        scratch: int32 [N, 2 * CAPACITY].
        COUNTERS_OFFSET: of the counters in engine_state, in int32.
        SAMPLED_IDS_OFFSET: of the sampled ids in engine_state, in int32; MAX_NUM_SEQS of them.
        MOST_SPLITS: a power of two, at most CAPACITY.
        BLOCK: tokens looked at together.
        CAPACITY: candidates that are copied out, at most; less than 2**COUNT_BITS.
    """
    split = tl.program_id(0)
    row = tl.program_id(1)
    row_logits = logits + row.to(tl.int64) * VOCAB_SIZE
    row_scratch = scratch + row.to(tl.int64) * (2 * CAPACITY)
    state = engine_state.to(tl.pointer_type(tl.int32), bitcast=True)
    if row >= used(engine_state, ROWS, tl.num_programs(1)):
        return

    per_split = tl.cdiv(tl.cdiv(VOCAB_SIZE, BLOCK), num_splits) * BLOCK
    splits_used = tl.cdiv(VOCAB_SIZE, per_split)
    if split >= splits_used:
        return
    slot = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    largest_id = tl.full([BLOCK], VOCAB_SIZE, tl.int32)
    begin = split * per_split
    for start in range(begin, tl.minimum(begin + per_split, VOCAB_SIZE), BLOCK):
        token = start + slot
        logit = tl.load(row_logits + token, mask=token < VOCAB_SIZE, other=float("-inf"))
        logit = tl.where(logit != logit, float("inf"), logit)  # as useless as infinity, and easier to keep
        largest_id = tl.where(logit > largest, token, largest_id)
        largest = tl.maximum(largest, logit)
    best = tl.max(largest)
    best_id = tl.min(tl.where(largest == best, largest_id, VOCAB_SIZE))

    if splits_used > 1:
        tl.store(row_scratch + split, best.to(tl.int32, bitcast=True))
        tl.store(row_scratch + CAPACITY + split, best_id)
        tl.debug_barrier()  # every thread's stores come before the count
        arrived = tl.atomic_add(state + COUNTERS_OFFSET + row, 1, sem="acq_rel")
        if arrived != splits_used - 1:
            return
        tl.store(state + COUNTERS_OFFSET + row, 0)
        tl.debug_barrier()
        part = tl.arange(0, MOST_SPLITS)
        bits = tl.load(row_scratch + part, mask=part < splits_used, other=0, cache_modifier=".cg")
        parts = tl.where(part < splits_used, bits.to(tl.float32, bitcast=True), float("-inf"))
        ids = tl.load(
            row_scratch + CAPACITY + part, mask=part < splits_used, other=VOCAB_SIZE, cache_modifier=".cg"
        )
        best = tl.max(parts)
        best_id = tl.min(tl.where(parts == best, ids, VOCAB_SIZE))
        tl.debug_barrier()  # before the scratch serves for candidates

    best = tl.where(best == 0.0, 0.0, best)  # -0.0 would lie at the distance -0.0 of 0.0
    chosen = best_id
    if (best == float("inf")) | (best == float("-inf")):
        chosen = -1
    else:
        chances = sampling + row * SAMPLING_WIDTH
        inverse_temperature = tl.load(chances)
        if inverse_temperature > 0.0:
            chosen = _draw(
                row_logits,
                best,
                best_id,
                inverse_temperature,
                tl.load(chances + 1),
                tl.load(chances + 2),
                tl.load(chances + 3),
                tl.load(chances + 4),
                row_scratch.to(tl.pointer_type(tl.int64), bitcast=True),
                VOCAB_SIZE,
                BLOCK,
                CAPACITY,
            )
    tl.store(sampled_ids + row, chosen)
    if row < MAX_NUM_SEQS:
        tl.store(state + SAMPLED_IDS_OFFSET + row, chosen)
