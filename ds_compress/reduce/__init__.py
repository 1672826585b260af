"""Collectives over gradients and weights that send few bits, or withstand bad senders.

    codec        how elements become bytes: int8 and int4 blocks, or the elements themselves
    slices       which elements of a bucket each owner is to get, cut into pieces
    hosts        which processes share a machine
    pipeline     several pieces under way at a time
    exchange     reduce-scatter and all-reduce of messages
    residuals    what messages lost, kept in few bits: error feedback
    rules        sums that a few bad workers cannot move far
    robust       the exchange under such a rule, and who stood out
    differences  the exchange of updated weights
    link         which of two ways is faster here

Nothing here knows DeepSpeed. Every function is a collective unless it says otherwise: all processes of the group call
it with tensors of equal sizes, in the same order.
"""
