"""How much the loss grows when one group of layers is stored in one format, and the best mix of formats for a size.

    formats       what a layer can be stored in, by short names: int4_g64, nvfp4, ...
    groups        layers that share a format, because servers join them into one matrix
    calibration   the text, in batches
    increase      by how much outputs, or the loss, differ from those of the model as it is
    measure       every group in every format, on every batch; over several processes
    table         what was measured, as a file
    goal          a number of bytes, or of bits for each weight
    knapsack      one format for each group, within a number of bytes
    patterns      regexes for the layers that got a format
    search        from a table and a goal to the block of a JSON

Sources: HAWQ (Dong et al. 2019) chooses bits by a layer's sensitivity; ModelOpt's AutoQuantize solves the same program
over formats, with effective bits as the goal.
"""
