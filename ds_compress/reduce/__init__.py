"""Communication compression and robust reduction: collectives that send few bits, or tolerate bad workers.

    codec, stochastic   how elements become a payload: int8 and int4 blocks, or the elements themselves
    uncompressed        which parameters are sent as they are
    slices              which elements of a bucket each owner gets, in chunks
    nodes               which processes share a node
    pipeline            several chunks in flight at a time
    exchange            reduce-scatter and all-reduce of payloads
    residuals           error feedback
    momentum            worker momentum
    rules, sorting      means that a few bad workers cannot move far
    robust, outliers    the exchange under such a rule, and which workers are flagged
    weight_deltas       the exchange of updated weights
    bandwidth           which of two collectives is faster here

Nothing here knows DeepSpeed. Every function is a collective unless it says otherwise: all processes of the group call
it with tensors of equal sizes, in the same order.
"""
