"""Convert texts and comments of PNG, JPEG and GIF files to the fields in which another format stores them."""

from __future__ import annotations

from dataclasses import replace

from savl.images import exif as exif_blocks
from savl.images.exif import ExifBlock, build_exif, text_entry, user_comment
from savl.images.format import JPEG, PNG, TIFF, ImageFormat
from savl.images.metadata_record import Metadata
from savl.images.tiff_directory import Entry
from savl.images.xmp import add_captions, captions_of

# PNG's predefined keywords → EXIF tag and Dublin Core property of the same meaning.
_KEYWORDS = {
    "Title": (exif_blocks.DOCUMENT_NAME, "title"),
    "Author": (exif_blocks.ARTIST, "creator"),
    "Description": (exif_blocks.DESCRIPTION, "description"),
    "Copyright": (exif_blocks.COPYRIGHT, "rights"),
    "Software": (exif_blocks.SOFTWARE, None),
}
_COMMENT, _A_COMMENT = "Comment", "a comment"
_NAMED_KEYWORDS = 6
# Keyword of prompts in PNG files by image generators, which store them in EXIF's user comment in other formats.
_PARAMETERS = "parameters"


def put_captions(metadata: Metadata, image_format: ImageFormat, lost: list[str]) -> Metadata:
    """Move texts and comments to the fields in which a format stores them.

    PNG stores all of them. For other formats, title, author, description, copyright and software go to EXIF and XMP
    unless these contain another value; a comment goes to a JPEG comment, or else to EXIF's user comment.

    Args:
        metadata: Metadata of the image.
        image_format: Format to write.
        lost: List to which the names of texts without a place are appended.

    Returns:
        The metadata with these fields.
    """
    if image_format is PNG:
        return metadata
    captions: dict[str, str] = {}
    comments = list(metadata.comments)
    user_comments: list[tuple[str, str]] = []
    unplaced: list[str] = []
    for text in metadata.text:
        if text.keyword in _KEYWORDS:
            joined = (captions.get(text.keyword), text.text)
            captions[text.keyword] = "\n".join(part for part in joined if part)
        elif text.keyword == _COMMENT:
            comments.append(text.text)
        elif text.keyword == _PARAMETERS and not user_comments:
            user_comments.append((f"the PNG text {text.keyword}", text.text))
        else:
            unplaced.append(text.keyword)
    if image_format is not JPEG:
        user_comments += [(_A_COMMENT, comment) for comment in comments]
        comments = []
    exif, kept = _with_entries(metadata.exif, captions, user_comments, image_format)
    left = [name for name, _ in user_comments[kept:]]
    lost += [name for name in left if name != _A_COMMENT]
    comments_left = left.count(_A_COMMENT)
    if comments_left:
        lost.append(_A_COMMENT if comments_left == 1 else f"{comments_left} comments")
    packet = add_captions(
        metadata.xmp, **{name: captions.get(keyword, "") for keyword, (_, name) in _KEYWORDS.items() if name}
    )
    unplaced += [keyword for keyword, text in captions.items() if not _is_present(keyword, text, exif, packet)]
    if unplaced:
        lost.append(_named_texts(list(dict.fromkeys(unplaced))))
    return replace(metadata, exif=exif, xmp=packet, comments=tuple(comments), text=())


def _is_present(keyword: str, text: str, exif: bytes | None, packet: bytes | None) -> bool:
    """Return whether EXIF or XMP contains the text, apart from spaces and control characters."""
    tag, name = _KEYWORDS[keyword]
    entry = None if exif is None else ExifBlock(exif).get(exif_blocks.IMAGE, tag)
    held = [] if entry is None else [entry.text()]
    if name is not None and packet is not None:
        held += captions_of(packet, name)
    return not _bare(text) or _bare(text) in [_bare(other) for other in held]


def _bare(text: str) -> str:
    return "".join(character for character in text if character.isprintable() and not character.isspace())


def _named_texts(keywords: list[str]) -> str:
    more = len(keywords) - _NAMED_KEYWORDS
    names = ", ".join(keywords[:_NAMED_KEYWORDS]) + (f" ({more} more)" if more > 0 else "")
    return f"the PNG text{'' if len(keywords) == 1 else 's'} {names}"


def _with_entries(
    exif: bytes | None, captions: dict[str, str], user_comments: list[tuple[str, str]], image_format: ImageFormat
) -> tuple[bytes | None, int]:
    """Add captions and the first user comment to an EXIF block; return it and the number of comments added."""
    order = "<" if exif is None else ExifBlock(exif).order
    image: list[Entry] = []
    for keyword, text in captions.items():
        # The title is stored in XMP; EXIF's document name is used by TIFF only.
        if text and (keyword != "Title" or image_format is TIFF):
            image.append(text_entry(_KEYWORDS[keyword][0], text))
    photo = [user_comment(text, order) for _, text in user_comments[:1]]
    if exif is None:
        return build_exif({exif_blocks.IMAGE: image, exif_blocks.PHOTO: photo}, order), len(photo)
    block = ExifBlock(exif)
    for entry in image:
        if block.get(exif_blocks.IMAGE, entry.tag) is None:
            block.put(exif_blocks.IMAGE, entry)
    taken = block.get(exif_blocks.PHOTO, exif_blocks.USER_COMMENT) is None
    if taken:
        for entry in photo:
            block.put(exif_blocks.PHOTO, entry)
    return block.to_bytes(), len(photo) if taken else 0
