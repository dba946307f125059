"""Draws every second prompt of prompts.txt with the 16-bit demo model: the sheet of demo/README.md.

python -m demo.contact_sheet
"""

from PIL import Image

from demo.in_process import DemoHost
from demo.settings import ASSETS, PROMPTS, SIZE

COLUMNS = 7


def main() -> None:
    host = DemoHost()
    model = host.load_demo()
    prompts = PROMPTS[::2]
    sheet = Image.new("RGB", (COLUMNS * SIZE, -(-len(prompts) // COLUMNS) * SIZE), "white")
    for index, prompt in enumerate(prompts):
        row, column = divmod(index, COLUMNS)
        sheet.paste(host.draw(model, prompt, seed=index), (column * SIZE, row * SIZE))
    sheet.quantize(256, kmeans=2).save(ASSETS / "contact_sheet.png", optimize=True)


if __name__ == "__main__":
    main()
