"""Viridis, the colour map for values in a range: perceptually uniform, and readable without colour vision.

By Stéfan van der Walt and Nathaniel Smith, dedicated to the public domain (CC0); the table is matplotlib's, in 8 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TABLE = np.frombuffer(
    bytes.fromhex(
        "44015444025544035745055845065a45085b46095c460b5e460c5f460e61470f6247116347126547146647156747166947186a48196b481a6c"
        "481c6e481d6f481e70482071482172482273482374472575472676472777472878472a79472b7a472c7b462d7c462f7c46307d46317e45327f"
        "45347f453580453681443781443982433a83433b83433c84423d84423e854240854141864142864043874044873f45873f47883e48883e4989"
        "3d4a893d4b893d4c893c4d8a3c4e8a3b508a3b518a3a528b3a538b39548b39558b38568b38578c37588c37598c365a8c365b8c355c8c355d8c"
        "345e8d345f8d33608d33618d32628d32638d31648d31658d31668d30678d30688d2f698d2f6a8d2e6b8e2e6c8e2e6d8e2d6e8e2d6f8e2c708e"
        "2c718e2c728e2b738e2b748e2a758e2a768e2a778e29788e29798e287a8e287a8e287b8e277c8e277d8e277e8e267f8e26808e26818e25828e"
        "25838d24848d24858d24868d23878d23888d23898d22898d228a8d228b8d218c8d218d8c218e8c208f8c20908c20918c1f928c1f938b1f948b"
        "1f958b1f968b1e978a1e988a1e998a1e998a1e9a891e9b891e9c891e9d881e9e881e9f881ea0871fa1871fa2861fa38620a48520a58521a685"
        "21a78422a78423a88323a98224aa8225ab8126ac8127ad8028ae7f29af7f2ab07e2bb17d2cb17d2eb27c2fb37b30b47a32b57a33b67935b778"
        "36b87738b97639b9763bba753dbb743ebc7340bd7242be7144be7045bf6f47c06e49c16d4bc26c4dc26b4fc36951c46853c56755c66657c665"
        "59c7645bc8625ec96160c96062ca5f64cb5d67cc5c69cc5b6bcd596dce5870ce5672cf5574d05477d05279d1517cd24f7ed24e81d34c83d34b"
        "86d44988d5478bd5468dd64490d64392d74195d73f97d83e9ad83c9dd93a9fd938a2da37a5da35a7db33aadb32addc30afdc2eb2dd2cb5dd2b"
        "b7dd29bade27bdde26bfdf24c2df22c5df21c7e01fcae01ecde01dcfe11cd2e11bd4e11ad7e219dae218dce218dfe318e1e318e4e318e7e419"
        "e9e419ece41aeee51bf1e51cf3e51ef6e61ff8e621fae622fde724"
    ),
    dtype=np.uint8,
).reshape(256, 3)


def viridis(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the colours of values in [0, 1], dark violet for 0 and yellow for 1.

    Args:
        values: Of any shape, floating; values outside the range get the colour of the nearest end, NaN gets black.

    Returns:
        RGB, ``(*values.shape, 3)`` uint8.
    """
    undefined = np.isnan(values)
    # As matplotlib does it: 256 bins of equal width, of which the last includes 1.
    bins = np.clip(np.where(undefined, 0, values) * 256, 0, 255).astype(np.uint8)
    colours: NDArray[np.uint8] = _TABLE[bins]
    colours[undefined] = 0
    return colours
