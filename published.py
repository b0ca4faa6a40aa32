"""What the papers print for MVTec AD, to set beside one's own results. Facts only; copy this file into your project.

Every cell of a table is "unified/separate" in percent: one model for all 15 categories / one model per category. A cell
that was hard to read in the copy at hand is marked "~"; "-" is not published.
"""

# UniAD (You et al., NeurIPS 2022), Table 1. UniAD's own unified column is a mean over 5 seeds.
IMAGE_AUROC = """
category    us         psvdd       padim       cutpaste    mkd         draem      uniad
bottle      84.0/99.0  85.5/98.6   97.9/99.9   67.9/98.2   98.7/99.4~  97.5/99.2  99.7/100
cable       60.0/86.2  64.4/90.3   70.9/92.7   69.2/81.2   78.2/89.2~  57.8/91.8  95.2/97.6
capsule     57.6/86.1  61.3/76.7   73.4/91.3   63.0/98.2   68.3/80.5   65.3/98.5  86.9/85.3
hazelnut    95.8/93.1  83.9/92.0   85.5/92.0   80.9/98.3~  97.1/98.4~  93.7/100   99.8/99.9
metal_nut   62.7/82.0  80.9/94.0   88.0/98.7   60.0/99.9   64.9/73.6   72.8/98.7  99.2/99.0
pill        56.1/87.9  89.4/86.1   68.8/93.3   71.4/94.9   79.7/82.7   82.2/98.9  93.7/88.3
screw       66.9/54.9  80.9/81.3   56.9/85.8   85.2/88.7   75.6/83.3   92.0/93.9  87.5/91.9
toothbrush  57.8/95.3  99.4/100    95.3/96.1~  63.9/99.4~  75.3/92.2   90.6/100   94.2/95.0
transistor  61.0/81.8  77.5/91.5   86.6/97.4   57.9/96.1~  73.4/85.6   74.8/93.1  99.8/100
zipper      78.6/91.9  77.8/97.9   79.7/90.3   93.5/99.9   87.4/93.2   98.8/100   95.8/96.7
carpet      86.6/91.6  63.3/92.9   93.8/99.8   93.6/93.9   69.8/79.3   98.0/97.0  99.8/99.9
grid        69.2/81.0  66.0/94.6   73.9/96.7~  93.2/100    83.8/78.0   99.3/99.9  98.2/98.5
leather     97.2/88.2  60.8/90.9~  99.9/100    93.4/100    93.6/95.1   98.7/100   100/100
tile        93.7/99.1  88.3/97.8   93.3/98.1   88.6/94.6   89.5/91.6   99.8/99.6  99.3/99.0
wood        90.6/97.7  72.1/96.5~  98.4/99.2   80.4/99.1   93.4/94.3   99.8/99.1  98.6/97.9
mean        74.5/87.7  76.8/92.1   84.2/95.5   77.5/96.1~  81.9/87.8   88.1/98.0  96.5/96.6
"""

# The same paper, Table 2.
PIXEL_AUROC = """
category    us          psvdd       padim       fcdd      mkd         draem       uniad
bottle      67.9/97.8   86.7/98.1   96.1/98.2   56.0/97   91.8/96.3~  87.6/99.1~  98.1/98.1
cable       78.3/91.9   62.2/96.8~  81.0/96.7~  64.1/90~  89.3/82.4~  71.3/94.7   97.3/96.8
capsule     85.5/96.8   83.1/95.8   96.9/98.6   67.6/93   88.3/95.9   50.5/94.3   98.5/97.9
hazelnut    93.7/98.2   97.4/97.5   96.3/98.1   79.3/95   91.2/94.6   96.9/99.7~  98.1/98.8
metal_nut   76.6/97.2   96.0/98.0   84.8/97.3   57.5/94   64.2/86.4~  62.2/99.5~  94.8/95.7
pill        80.3/96.5~  96.5/95.1   87.7/95.7   65.9/81   69.7/89.6~  94.4/97.6   95.0/95.1
screw       90.8/97.4   74.3/95.7   94.1/98.4   67.2/86~  92.1/96.0~  95.5/97.6   98.3/97.4
toothbrush  86.9/97.9   98.0/98.1   95.6/98.8   60.8/94   88.9/96.1   97.7/98.1   98.4/97.8
transistor  68.3/73.7   78.5/97.0   92.3/97.6   54.2/88~  71.7/76.5   64.5/90.9   97.9/98.7
zipper      84.2/95.6   95.1/95.1   94.8/98.4   63.0/92   86.1/93.9   98.3/98.8   96.8/96.0
carpet      88.7/93.5   78.6/92.6   97.6/99.0   68.6/96~  95.5/95.6   98.6/95.5   98.5/98.0
grid        64.5/89.9   70.8/96.2~  71.0/97.1   65.8/91   82.3/91.8   98.7/99.7~  96.5/94.6
leather     95.4/97.8   93.5/97.4   84.8/99.0~  66.3/98~  96.7/98.1   97.3/98.6   98.8/98.3
tile        82.7/92.5   92.1/91.4   80.5/94.1   59.3/91   85.3/82.8   98.0/99.2~  91.8/91.8
wood        83.3/92.1   80.7/90.8   89.1/94.1   53.3/88   80.5/84.8   96.0/96.4~  93.2/93.4
mean        81.8/93.9   85.6/95.7   89.5/97.4   63.3/92   84.9/90.7   87.2/97.3   96.8/96.6
"""

# EAR (Park et al., Scientific Reports 14:18872, 2024), the authors' poster, Tables 1 and 3: its plain U-Net, and EAR
# with the mosaic predicted from normal images.
EAR_IMAGE_AUROC = """
category    unet     ear
bottle      -/86.3   -/99.7
cable       -/63.6   -/85.3
capsule     -/67.3   -/87.0
carpet      -/77.4   -/85.0
grid        -/85.7   -/95.2
hazelnut    -/99.6   -/99.7
leather     -/87.0   -/100.0
metal_nut   -/67.6   -/85.6
pill        -/78.1   -/92.2
screw       -/100.0  -/77.9
tile        -/96.4   -/91.8
toothbrush  -/81.1   -/100.0
transistor  -/67.4   -/94.7
wood        -/95.8   -/94.6
zipper      -/75.0   -/94.9
mean        -/81.9   -/92.2
"""


def published(method, category, unified):
    """-> "image/pixel" AUROC in percent, None where there is neither.

    method: its name in this program. category: its name in MVTec AD. unified: one model for all categories.
    """
    cells = [look_up(table, method, category) for table in (IMAGE_AUROC, EAR_IMAGE_AUROC, PIXEL_AUROC)]
    image, ear, pixel = (cell.strip("~").split("/")[not unified] + "~" * cell.endswith("~") for cell in cells)
    image = ear if image == "-" else image
    return None if image == pixel == "-" else f"{image}/{pixel}"


def look_up(table, method, category):
    """-> the cell of a table, "-/-" where it has none."""
    head, *lines = [line.split() for line in table.strip().splitlines()]
    row = next((line for line in lines if line[0] == category), [])
    return row[head.index(method)] if row and method in head else "-/-"
