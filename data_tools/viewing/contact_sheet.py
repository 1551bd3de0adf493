"""Contact sheet of a pack: a strip of the whole pack, then the text and tiles of each document."""

import re
from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

from data_tools.viewing.view import (
    DocumentView,
    MediumView,
    PackView,
    TokenRun,
    heading,
    tile_numbers,
)
from megatron_vita.sizes import counted

WIDTH = 1200
MARGIN = 16
STRIP = 36
TEXT_SIZE = 15
LINE = 22
THUMBNAIL = 128
GAP = 8
CAPTION = 18
LINES = 1
COLUMNS = 4
STEP = THUMBNAIL + GAP
TEXT_EDGE = WIDTH - MARGIN - COLUMNS * STEP - GAP
TILES_LEFT = TEXT_EDGE + 2 * GAP
MAX_TILES = 96
MAX_CHARACTERS = 1500
# The first one also has Chinese, Japanese and Korean characters, which samples often hold.
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf")
INK = "#1c1c1c"
PAPER = "#ffffff"
FAINT = "#8a8a8a"
COLORS = {
    "text": "#e6e6e6",
    "loss": "#a6dba0",
    "tile": "#9ecae1",
    "frame": "#c9b8e6",
    "padding": "#c9a7a7",
}
LEGEND = {"text": "no loss", "loss": "loss", "tile": "tile", "frame": "frame", "padding": "padding"}


def draw_sheet(view: PackView, *, max_height: int = 0) -> Image.Image:
    """Draw the contact sheet; long texts are cut in the middle, long lists of tiles at the end.

    max_height: height in pixels after which further documents are only counted; 0: no limit.
    """
    sheet = _Sheet()
    sheet.line(view.title, INK)
    sheet.legend()
    sheet.strip(view)
    for place, document in enumerate(view.documents):
        if max_height and place and sheet.height >= max_height:
            left_out = len(view.documents) - place
            sheet.line(f"and {counted(left_out, 'more document')}", FAINT, rule=True)
            break
        sheet.skip(GAP)
        sheet.line(heading(document), INK, rule=True)
        sheet.document(view, document)
    return sheet.finish()


class _Sheet:
    """Canvas that is filled from top to bottom and grows as needed."""

    def __init__(self) -> None:
        self._font = _font(TEXT_SIZE)
        self._small = _font(TEXT_SIZE - 4)
        self._y = MARGIN
        self._canvas = Image.new("RGB", (WIDTH, 1000), PAPER)
        self._draw = ImageDraw.Draw(self._canvas)

    @property
    def height(self) -> int:
        """Pixels drawn so far."""
        return self._y

    def skip(self, pixels: int) -> None:
        """Move down, keeping room for a row of tiles below."""
        self._y += pixels
        self._make_room(2 * THUMBNAIL)

    def _make_room(self, pixels: int) -> None:
        """Extend the canvas to at least this many pixels below the current position."""
        if self._y + pixels > self._canvas.height:
            taller = Image.new("RGB", (WIDTH, 2 * self._canvas.height + pixels), PAPER)
            taller.paste(self._canvas)
            self._canvas = taller
            self._draw = ImageDraw.Draw(taller)

    def finish(self) -> Image.Image:
        return self._canvas.crop((0, 0, WIDTH, self._y + MARGIN))

    def line(self, text: str, color: str, *, rule: bool = False) -> None:
        if rule:
            self._draw.line([(MARGIN, self._y), (WIDTH - MARGIN, self._y)], fill=FAINT)
            self.skip(4)
        for piece in self._wrapped(text):
            self._draw.text((MARGIN, self._y), piece, fill=color, font=self._font)
            self.skip(LINE)

    def legend(self) -> None:
        x = MARGIN
        for kind, name in LEGEND.items():
            self._draw.rectangle([x, self._y + 2, x + 16, self._y + 18], fill=COLORS[kind])
            self._draw.text((x + 22, self._y), name, fill=INK, font=self._font)
            x += 110
        self.skip(LINE + 4)

    def strip(self, view: PackView) -> None:
        """Draw the pack from its first token to its last, with a mark at the beginning of each
        document."""
        scale = (WIDTH - 2 * MARGIN) / view.seq_length
        for document in view.documents:
            position = document.start
            for run in document.runs:
                left = MARGIN + position * scale
                right = MARGIN + (position + run.tokens) * scale
                self._draw.rectangle(
                    [left, self._y, max(left, right - 1), self._y + STRIP], fill=COLORS[run.kind]
                )
                position += run.tokens
        # Marks last, on top of the runs.
        for document in view.documents:
            x = MARGIN + document.start * scale
            self._draw.line([(x, self._y - 3), (x, self._y + STRIP + 3)], fill=INK)
        self.skip(STRIP + GAP)

    def document(self, view: PackView, document: DocumentView) -> None:
        """Draw text on the left and tiles on the right; text alone takes the whole width."""
        top = self._y
        edge = WIDTH - MARGIN
        if document.tiles:
            edge = TEXT_EDGE
        self._runs([_shortened(run) for run in document.runs], edge)
        bottom = self._y
        self._y = top
        self._tiles(view, document)
        self._y = max(self._y, bottom)

    def _runs(self, runs: list[TokenRun], edge: int) -> None:
        """Flow the words of runs over lines, each on the colour of its kind."""
        x = MARGIN
        for run in runs:
            for word in _words(run):
                # A line break is shown as an arrow, and breaks the line as well.
                for part in self._fitting(word.replace("\n", "\u21b5"), edge - MARGIN):
                    width = int(self._font.getlength(part)) + 1
                    if x + width > edge:
                        self.skip(LINE)
                        x = MARGIN
                    self._draw.rectangle(
                        [x, self._y, x + width, self._y + LINE - 3], fill=COLORS[run.kind]
                    )
                    self._draw.text((x, self._y + 1), part, fill=INK, font=self._font)
                    x += width
                if word == "\n":
                    self.skip(LINE)
                    x = MARGIN
        if x > MARGIN:
            self.skip(LINE)
        self.skip(GAP)

    def _tiles(self, view: PackView, document: DocumentView) -> None:
        """The document's media: frames from left to right, images with their cells in their grid."""
        left = MAX_TILES
        for picture in document.pictures:
            if len(picture.tiles) > left and picture.grid is not None:
                break
            if picture.thumbnail is None:
                self._row_by_row(view, picture.tiles[:left])
            else:
                self._grid(view, picture)
            left -= min(len(picture.tiles), left)
        hidden = len(document.tiles) - (MAX_TILES - left)
        if hidden:
            text = f"and {counted(hidden, 'more tile')}"
            self._draw.text((TILES_LEFT, self._y), text, fill=FAINT, font=self._font)
            self.skip(LINE)

    def _row_by_row(self, view: PackView, tiles: range) -> None:
        """Tiles from left to right, each with its number in the pack and its place or time."""
        for place, tile in enumerate(tiles):
            if place and place % COLUMNS == 0:
                self.skip(STEP + CAPTION)
            x = TILES_LEFT + place % COLUMNS * STEP
            self._tile(view, tile, x, self._y, THUMBNAIL)
            self._caption(x, f"{tile + 1}: {view.labels[tile]}")
        self.skip(STEP + CAPTION)

    def _grid(self, view: PackView, picture: MediumView) -> None:
        """An image's cells side by side, as they make it up, and its thumbnail apart."""
        assert picture.grid is not None
        cols, rows = picture.grid
        side = min(THUMBNAIL, (COLUMNS - 1) * STEP // cols - LINES)
        pitch = side + LINES  # a hair's breadth between cells
        self._make_room(rows * pitch + 2 * THUMBNAIL)
        for place, tile in enumerate(picture.cells):
            row, col = divmod(place, cols)
            self._tile(view, tile, TILES_LEFT + col * pitch, self._y + row * pitch, side)
        thumbnail = picture.tiles[0] if picture.thumbnail is None else picture.thumbnail
        x = TILES_LEFT + cols * pitch + GAP
        self._tile(view, thumbnail, x, self._y, THUMBNAIL)
        self._caption(x, f"{thumbnail + 1}: thumbnail")
        self.skip(max(rows * pitch, THUMBNAIL + CAPTION) - THUMBNAIL)
        self._caption(TILES_LEFT, f"{tile_numbers(picture.cells)}: {cols} x {rows}")
        self.skip(STEP + CAPTION)

    def _tile(self, view: PackView, tile: int, x: int, y: int, side: int) -> None:
        image = Image.fromarray(view.tiles[tile].transpose(1, 2, 0)).resize((side, side))
        self._draw.rectangle([x - LINES, y - LINES, x + side, y + side], outline=FAINT)
        self._canvas.paste(image, (x, y))

    def _caption(self, x: int, text: str) -> None:
        """Below a row of tiles that begins here."""
        self._draw.text((x, self._y + THUMBNAIL + 2), text, fill=INK, font=self._small)

    def _wrapped(self, text: str) -> Iterator[str]:
        line = ""
        for word in text.split(" "):
            if line and self._font.getlength(f"{line} {word}") > WIDTH - 2 * MARGIN:
                yield line
                line = word
            elif line:
                line = f"{line} {word}"
            else:
                line = word
        yield line

    def _fitting(self, word: str, width: int) -> Iterator[str]:
        """Split a word into parts of at most `width` pixels, for texts without spaces."""
        while self._font.getlength(word) > width:
            cut = next(
                i
                for i in range(len(word), 0, -1)
                if i == 1 or self._font.getlength(word[:i]) <= width
            )
            yield word[:cut]
            word = word[cut:]
        yield word


def _words(run: TokenRun) -> list[str]:
    """Words of a text with the spaces before them, and its line breaks; labels stay whole."""
    if run.kind in ("text", "loss"):
        # With the spaces before them: they belong to tokens, and are shown as the model has them.
        return re.findall(r"\n|[^\S\n]*[^\s]+|[^\S\n]+", run.text)
    return [run.text]


def _shortened(run: TokenRun) -> TokenRun:
    excess = len(run.text) - MAX_CHARACTERS
    if excess <= 0:
        return run
    half = MAX_CHARACTERS // 2
    return run._replace(text=f"{run.text[:half]} [... {excess} characters ...] {run.text[-half:]}")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load the first of FONTS that is installed, else Pillow's own with only Latin letters."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
