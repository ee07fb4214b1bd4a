"""Numbers in pixels are scaled with the image: in EXIF, in XMP and in the georeference of TIFF files."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from savl.images.exif import GPS, IMAGE, PHOTO, ExifBlock, build_exif, resized_exif, turn_point, upright_exif
from savl.images.format import JPEG, PNG, TIFF, WEBP
from savl.images.metadata import losses
from savl.images.png_chunks import encode_chunk
from savl.images.read import read_image
from savl.images.tiff_directory import ASCII, SHORT, UNDEFINED, Entry
from savl.images.write import write_image
from savl.images.xmp import clean_xmp, parse_xmp, resize_xmp

NAMESPACES = {
    "exif": "http://ns.adobe.com/exif/1.0/",
    "GPano": "http://ns.google.com/photos/1.0/panorama/",
    "mwg-rs": "http://www.metadataworkinggroup.com/schemas/regions/",
    "stDim": "http://ns.adobe.com/xap/1.0/sType/Dimensions#",
    "stArea": "http://ns.adobe.com/xmp/sType/Area#",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "GCamera": "http://ns.google.com/photos/1.0/camera/",
}


def packet(attributes: str, inner: str = "") -> bytes:
    names = "".join(f' xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items())
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about=""{names} {attributes}>{inner}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def photo(order: str = "<", **values: tuple[int, ...]) -> bytes:
    tags = {"subject_area": 0x9214, "subject_location": 0xA214, "width": 0xA002, "height": 0xA003}
    entries = [Entry(tags[name], SHORT, struct.pack(f"{order}{len(value)}H", *value)) for name, value in values.items()]
    built = build_exif({PHOTO: entries}, order)
    assert built is not None
    return built


def pillow(block: bytes) -> Image.Exif:
    exif = Image.Exif()
    exif.load(block)
    return exif


@pytest.mark.parametrize("order", ["<", ">"])
def test_sizes_and_positions_in_exif_follow_the_picture(order: str) -> None:
    block = photo(order, subject_area=(10, 20, 4, 6), subject_location=(10, 20), width=(100,), height=(50,))
    details = pillow(resized_exif(block, (400, 100), (4.0, 2.0))).get_ifd(PHOTO)
    assert (details[0xA002], details[0xA003]) == (400, 100)
    assert details[0x9214] == (40, 40, 16, 12)
    assert details[0xA214] == (40, 40)


def test_a_round_subject_area_keeps_its_diameter_in_proportion() -> None:
    details = pillow(resized_exif(photo(subject_area=(10, 20, 8)), (400, 200), (4.0, 4.0))).get_ifd(PHOTO)
    assert details[0x9214] == (40, 80, 32)


def test_sides_beyond_16_bits_become_long() -> None:
    details = pillow(resized_exif(photo(width=(100,), height=(50,)), (70000, 35000), (700.0, 700.0))).get_ifd(PHOTO)
    assert (details[0xA002], details[0xA003]) == (70000, 35000)


def test_focal_plane_resolution_counts_the_new_pixels() -> None:
    exif = Image.Exif()
    exif.get_ifd(PHOTO).update({0xA20E: 3000.5, 0xA20F: 3000.5})
    details = pillow(resized_exif(exif.tobytes(), (8, 8), (4.0, 4.0))).get_ifd(PHOTO)
    assert float(details[0xA20E]) == pytest.approx(12002)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_position_is_where_pillow_turns_its_pixel(orientation: int) -> None:
    picture = Image.new("L", (7, 5))
    picture.putpixel((2, 1), 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(PHOTO)[0x9214] = (2, 1, 4, 3)
    block = exif.tobytes()
    method = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    turned = picture if method is None else picture.transpose(Image.Transpose(method))
    where = np.argwhere(np.asarray(turned) == 255)[0][::-1]
    assert turn_point(2, 1, (7, 5), orientation) == tuple(where)
    upright = pillow(upright_exif(block, orientation, (7, 5)))
    sides = (4, 3) if orientation < 5 else (3, 4)
    assert upright.get_ifd(PHOTO)[0x9214] == (*where, *sides)
    assert upright[0x0112] == 1


def test_makers_notes_keep_their_bytes_and_their_place() -> None:
    """Makers' notes contain offsets into the block, so new data must be appended."""
    note = b"MAKER\0" + bytes(range(200))
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    exif.get_ifd(PHOTO).update({0x927C: note, 0xA002: 10, 0xA003: 20})
    block = exif.tobytes()
    changed = resized_exif(upright_exif(block, 6, (20, 10)), (40, 80), (4.0, 4.0))
    assert changed.index(note) == block.index(note)
    editable = ExifBlock(changed)
    editable.put(IMAGE, Entry(0x8298, ASCII, b"Somebody's right\0"))
    editable.put(PHOTO, Entry(0x9286, UNDEFINED, b"ASCII\0\0\0a comment"))
    editable.put(GPS, Entry(1, ASCII, b"N\0"))
    grown = editable.to_bytes()
    assert grown.index(note) == block.index(note)
    read = pillow(grown)
    assert (read[0x010F], read[0x8298], read[0x0112]) == ("Maker", "Somebody's right", 1)
    assert read.get_ifd(PHOTO)[0x9286] == b"ASCII\0\0\0a comment"
    assert (read.get_ifd(PHOTO)[0x927C], read.get_ifd(PHOTO)[0xA002]) == (note, 40)
    assert read.get_ifd(GPS)[1] == "N"


def test_pixels_of_a_photo_sphere_are_scaled_and_angles_are_not() -> None:
    before = packet(
        'GPano:FullPanoWidthPixels="4000" GPano:FullPanoHeightPixels="2000" GPano:CroppedAreaLeftPixels="100" '
        'GPano:CroppedAreaTopPixels="50" GPano:PoseHeadingDegrees="350.5" GPano:ProjectionType="equirectangular"',
        "<GPano:CroppedAreaImageWidthPixels>3000</GPano:CroppedAreaImageWidthPixels>",
    )
    after = resize_xmp(before, (12000, 8000), (4.0, 4.0)).decode()
    for text in ('FullPanoWidthPixels="16000"', 'FullPanoHeightPixels="8000"', 'CroppedAreaLeftPixels="400"'):
        assert text in after
    for text in ('CroppedAreaTopPixels="200"', 'PoseHeadingDegrees="350.5"', "Pixels>12000</"):
        assert text in after


REGIONS = (
    '<mwg-rs:Regions rdf:parseType="Resource"><mwg-rs:AppliedToDimensions stDim:w="100" stDim:h="50" '
    'stDim:unit="pixel"/><mwg-rs:RegionList><rdf:Bag><rdf:li><rdf:Description mwg-rs:Name="Ada">'
    '<mwg-rs:Area stArea:x="0.5" stArea:y="0.25" stArea:w="0.1" stArea:h="0.2" stArea:unit="normalized"/>'
    "</rdf:Description></rdf:li></rdf:Bag></mwg-rs:RegionList></mwg-rs:Regions>"
)


def test_faces_stay_where_they_are() -> None:
    after = resize_xmp(packet("", REGIONS), (400, 200), (4.0, 4.0)).decode()
    assert 'stDim:w="400" stDim:h="200"' in after
    assert 'stArea:x="0.5" stArea:y="0.25" stArea:w="0.1" stArea:h="0.2"' in after
    pixels = packet("", REGIONS.replace("normalized", "pixel").replace("0.5", "50"))
    assert 'stArea:x="200"' in resize_xmp(pixels, (400, 200), (4.0, 4.0)).decode()


def test_regions_of_a_turned_picture_go_and_are_reported() -> None:
    kept, lost = clean_xmp(packet("", REGIONS), turned=False)
    assert (kept, lost) == (packet("", REGIONS), [])
    kept, lost = clean_xmp(packet("", REGIONS), turned=True)
    assert kept is not None
    assert b"Ada" not in kept
    assert lost == ["marked regions, as the image was turned"]


def test_iptc_regions_in_pixels_are_scaled() -> None:
    region = (
        "<Iptc4xmpExt:ImageRegion><rdf:Bag><rdf:li><Iptc4xmpExt:RegionBoundary Iptc4xmpExt:rbUnit='pixel' "
        "Iptc4xmpExt:rbX='10' Iptc4xmpExt:rbH='7.5'/></rdf:li></rdf:Bag></Iptc4xmpExt:ImageRegion>"
    )
    after = resize_xmp(packet("", region), (40, 40), (4.0, 2.0)).decode()
    assert 'rbX="40"' in after
    assert 'rbH="15"' in after
    relative = packet("", region.replace("'pixel'", "'relative'"))
    assert resize_xmp(relative, (40, 40), (4.0, 2.0)) == relative


def test_a_subject_area_in_xmp_is_scaled() -> None:
    items = "".join(f"<rdf:li>{value}</rdf:li>" for value in (10, 20, 4, 6))
    before = packet("", f"<exif:SubjectArea><rdf:Seq>{items}</rdf:Seq></exif:SubjectArea>")
    document = parse_xmp(resize_xmp(before, (400, 100), (4.0, 2.0)))
    values = [item.firstChild.data for item in document.getElementsByTagName("rdf:li")]
    assert values == ["40", "40", "16", "12"]


def test_a_motion_photo_is_reported() -> None:
    before = packet('GCamera:MotionPhoto="1" GCamera:MotionPhotoVersion="1" exif:UserComment="stays"')
    kept, lost = clean_xmp(before, turned=False)
    assert kept is not None
    assert b"MotionPhoto" not in kept
    assert b"stays" in kept
    assert lost == ["the film of a motion photo"]


def geotiff(path: Path, *, points: bool = False, big: bool = False, matrix: tuple[float, ...] = ()) -> Path:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype.update({33550: 12, 33922: 12, 34264: 12, 34735: 3, 42113: 2})
    if matrix:
        info[34264] = matrix
    else:
        info[33550] = (2.0, 3.0, 0.0)
        info[33922] = (0.0, 0.0, 0.0, 400000.0, 5000000.0, 0.0, 4.0, 5.0, 0.0, 400008.0, 4999985.0, 0.0)
    info[34735] = (1, 1, 0, 2, 1024, 0, 1, 1, 1025, 0, 1, 2 if points else 1)
    info[42113] = "-9999"
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(path, "tiff", tiffinfo=info, big_tiff=big)
    return path


def ground(tags: TiffImagePlugin.ImageFileDirectory_v2, x: float, y: float, *, points: bool) -> tuple[float, float]:
    """Return the ground coordinates of a position, in pixels from the corner of the image."""
    column, row = (x - 0.5, y - 0.5) if points else (x, y)
    if 34264 in tags:
        m = tags[34264]
        return m[0] * column + m[1] * row + m[3], m[4] * column + m[5] * row + m[7]
    scale, tie = tags[33550], tags[33922]
    return tie[3] + (column - tie[0]) * scale[0], tie[4] - (row - tie[1]) * scale[1]


@pytest.mark.parametrize("matrix", [(), (2.0, 0.5, 0, 4e5, 0.25, -3.0, 0, 5e6, 0, 0, 0, 0, 0, 0, 0, 1)])
@pytest.mark.parametrize("points", [False, True], ids=["areas", "points"])
@pytest.mark.parametrize("big", [False, True], ids=["classic", "BigTIFF"])
def test_the_ground_under_a_geotiff_stays_where_it_is(
    tmp_path: Path, points: bool, big: bool, matrix: tuple[float, ...]
) -> None:
    source = geotiff(tmp_path / "in", points=points, big=big, matrix=matrix)
    read = read_image(source)
    assert read.metadata.lost == ()
    write_image(tmp_path / "out", read.pixels.repeat(4, 0).repeat(4, 1), read.metadata, image_format=TIFF)
    before, after = Image.open(source).tag_v2, Image.open(tmp_path / "out").tag_v2
    for x, y in ((0, 0), (8, 6), (3.25, 1)):
        expected = ground(before, x, y, points=points)
        assert ground(after, 4 * x, 4 * y, points=points) == pytest.approx(expected, abs=1e-6)
    assert after[34735] == before[34735]
    assert after[42113] == "-9999"
    if not matrix:
        assert after[33550] == (0.5, 0.75, 0.0)
        shift = 0.5 if points else 0.0
        assert after[33922][6] == (4 + shift) * 4 - shift


def test_a_georeference_is_scaled_by_what_was_kept_of_a_cut_picture(tmp_path: Path) -> None:
    """Degrading by a factor of 4 keeps 8x4 of 9x6 pixels."""
    read = read_image(geotiff(tmp_path / "in"))
    write_image(tmp_path / "out", read.pixels[:1, :2], read.metadata.cropped(8, 4), image_format=TIFF)
    assert Image.open(tmp_path / "out").tag_v2[33550] == (8.0, 12.0, 0.0)


@pytest.mark.parametrize("image_format", [PNG, JPEG], ids=lambda f: f.name)
def test_a_georeference_is_named_where_it_is_lost(tmp_path: Path, image_format: object) -> None:
    read = read_image(geotiff(tmp_path / "in"))
    (sentence,) = losses(read.metadata, read.pixels, read.pixels, image_format)  # type: ignore[arg-type]
    assert sentence == "left out: the georeference (GeoTIFF)"


def test_unknown_tags_of_tiff_are_reported(tmp_path: Path) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype.update({50838: 4, 65000: 4, 65001: 4})
    info[50838] = info[65000] = info[65001] = 7
    Image.new("RGB", (8, 6)).save(tmp_path / "in", "tiff", tiffinfo=info)
    read = read_image(tmp_path / "in")
    (sentence,) = losses(read.metadata, read.pixels, read.pixels, TIFF)
    assert sentence == "left out: ImageJ's metadata, the TIFF tag 65000 and the TIFF tag 65001"


# Tags that describe the storage of samples, with type and value for a file of RGB in one strip.
STORAGE = {254: 0, 255: 1, 262: 2, 266: 1, 274: 1, 284: 1, 317: 1, 332: 2, 334: 4, 339: 1}
KEPT = {*range(269, 273), 282, 283, 285, 296, 297, 301, 305, 306, 315, 316, 318, 319}


# Tags for which another value would change or corrupt the image, or that have their own tests.
ELSEWHERE = {256, 257, 258, 259, 273, 277, 278, 279, 320, 322, 323, 324, 325, 330, 333, 336, 338, 342, 347}
TAGS = sorted({*range(254, 350), 433, 559, 32781, 34016, 34030, 37439, 40976, 50000} - ELSEWHERE)


@pytest.mark.parametrize("tag", TAGS)
def test_every_tag_of_tiff_is_storage_or_kept_or_named(tmp_path: Path, tag: int) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    text, numbers = tag in KEPT - {282, 283, 296, 297, 301, 318, 319}, dict.fromkeys((282, 283, 286, 287, 318, 319), 5)
    info.tagtype[tag] = 2 if text else numbers.get(tag, 3)
    counts = {297: (1, 2), 301: tuple(range(256)), 318: (0.3127, 0.329), 319: (0.68, 0.32, 0.265, 0.69, 0.15, 0.06)}
    info[tag] = "words" if text else counts.get(tag, STORAGE.get(tag, 2))
    if tag in (282, 283, 296):
        info[282], info[283], info[296] = 30.0, 30.0, 2
    Image.new("RGB", (8, 6)).save(tmp_path / "in", "tiff", tiffinfo=info)
    assert tag in Image.open(tmp_path / "in").tag_v2
    read = read_image(tmp_path / "in")
    write_image(tmp_path / "out", read.pixels, read.metadata, image_format=TIFF)
    lost = losses(read.metadata, read.pixels, read.pixels, TIFF)
    if tag in KEPT:
        assert lost == []
        assert Image.open(tmp_path / "out").tag_v2[tag] == Image.open(tmp_path / "in").tag_v2[tag]
    elif tag in STORAGE or tag in (288, 289, 292, 293) or 512 <= tag < 600:
        assert lost == []
    else:
        assert len(lost) == 1


def test_fields_about_the_page_and_the_printing_are_reported(tmp_path: Path) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info.tagtype.update({263: 3, 286: 5, 287: 5, 297: 3, 321: 3, 34016: 2})
    info[263], info[286], info[287], info[297], info[321], info[34016] = 1, 0.5, 0.5, (1, 3), (10, 240), "site"
    Image.new("RGB", (8, 6)).save(tmp_path / "in", "tiff", tiffinfo=info)
    read = read_image(tmp_path / "in")
    for target in (PNG, TIFF):
        (sentence,) = losses(read.metadata, read.pixels, read.pixels, target)
        assert sentence == "left out: the position on the page, the halftone hints and the TIFF tag 34016"
        write_image(tmp_path / "out", read.pixels, read.metadata, image_format=target, overwrite=True)
        assert Image.open(tmp_path / "out").getexif()[297] == (1, 3)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"shape": [6, 8, 3]}', None),
        ("ImageJ=1.54\nimages=3\nslices=3\nunit=um\n", "ImageJ=1.54\nunit=um\n"),
        ("A picture", "A picture"),
    ],
)
def test_a_description_says_nothing_of_how_the_old_samples_were_stored(
    tmp_path: Path, before: str, after: str | None
) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270] = before
    Image.new("RGB", (8, 6)).save(tmp_path / "in", "tiff", tiffinfo=info)
    read = read_image(tmp_path / "in")
    write_image(tmp_path / "out", read.pixels, read.metadata, image_format=TIFF)
    assert Image.open(tmp_path / "out").tag_v2.get(270) == after


def test_a_microscope_description_contains_the_new_size(tmp_path: Path) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270] = '<OME xmlns="x"><Image><Pixels SizeX="8" SizeY="6" SizeC="3" PhysicalSizeX="0.5"/></Image></OME>'
    Image.new("RGB", (8, 6)).save(tmp_path / "in", "tiff", tiffinfo=info)
    read = read_image(tmp_path / "in")
    write_image(tmp_path / "out", read.pixels.repeat(4, 0).repeat(4, 1), read.metadata, image_format=TIFF)
    described = Image.open(tmp_path / "out").tag_v2[270]
    assert '<Pixels SizeX="32" SizeY="24" SizeC="3" PhysicalSizeX="0.125"/>' in described


@pytest.mark.parametrize(("unit", "after"), [("unit=um\n", 20.0), ("", 5.0)], ids=["micrometres", "no unit"])
def test_pixels_per_unit_of_imagej_are_a_measure(tmp_path: Path, unit: str, after: float) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270], info[282], info[283], info[296] = f"ImageJ=1.54\n{unit}", 5.0, 5.0, 1
    Image.new("RGB", (8, 6)).save(tmp_path / "in", "tiff", tiffinfo=info)
    read = read_image(tmp_path / "in")
    enlarged = read.pixels.repeat(4, 0).repeat(4, 1)
    write_image(tmp_path / "out", enlarged, read.metadata, image_format=TIFF)
    tags = Image.open(tmp_path / "out").tag_v2
    assert (float(tags[282]), float(tags[283]), tags[296]) == (after, after, 1)
    write_image(tmp_path / "out.png", enlarged, read.metadata, image_format=PNG)
    assert b"pHYs" not in (tmp_path / "out.png").read_bytes()


@pytest.mark.parametrize("target", [PNG, JPEG, TIFF], ids=lambda f: f.name)
def test_pixels_that_are_not_square_stay_so(tmp_path: Path, target: object) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "png")
    chunk = struct.pack(">IIB", 2, 1, 0)
    whole = buffer.getvalue()
    read = read_image(whole[:33] + encode_chunk(b"pHYs", chunk) + whole[33:])
    (sentence,) = losses(read.metadata, read.pixels, read.pixels, WEBP)
    assert sentence == "left out: the proportions of pixels that are not square"
    write_image(tmp_path / "out", read.pixels, read.metadata, image_format=target)  # type: ignore[arg-type]
    opened = Image.open(tmp_path / "out")
    if target is PNG:
        assert opened.info["aspect"] == (2, 1)
    elif target is JPEG:
        assert (opened.info["jfif_unit"], opened.info["jfif_density"]) == (0, (2, 1))
    else:
        assert (opened.tag_v2[282], opened.tag_v2[283], opened.tag_v2[296]) == (2, 1, 1)


def test_bigtiff_holds_all_that_tiff_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savl.images.write._CLASSIC_TIFF_BYTES", 1)
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(PHOTO)[0x9003] = "2021:02:03 04:05:06"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "jpeg", exif=exif, icc_profile=b"\0" * 16 + b"RGB " + bytes(200))
    read = read_image(buffer.getvalue())
    write_image(tmp_path / "out", read.pixels, read.metadata, image_format=TIFF, mark="upscaled")
    assert (tmp_path / "out").read_bytes()[:4] == b"II+\0"
    opened = Image.open(tmp_path / "out")
    assert opened.tag_v2[0x010F] == "Maker"
    assert b"upscaled" in opened.tag_v2[700]
    assert opened.info["icc_profile"][16:20] == b"RGB "
    again = pillow(read_image(tmp_path / "out").metadata.exif or b"")
    assert again.get_ifd(PHOTO)[0x9003] == "2021:02:03 04:05:06"


def test_a_page_of_a_tiff_file_brings_its_own_metadata(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 6)), Image.new("RGB", (8, 6))]
    infos = []
    for name in ("first", "second"):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[285] = name
        infos.append(info)
    pages[1].encoderinfo = {"tiffinfo": infos[1]}
    pages[0].save(tmp_path / "in", "tiff", tiffinfo=infos[0], save_all=True, append_images=[pages[1]])
    for page, name in ((1, "first"), (2, "second")):
        exif = read_image(tmp_path / "in", page=page).metadata.exif
        assert pillow(exif or b"")[285] == name
