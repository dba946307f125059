"""What the browser may ask of the server. The routes are the host's: it serves them below ``/api`` too."""

import asyncio

from aiohttp import web

from .badge import badge


def add_routes(routes: web.RouteTableDef) -> None:
    """Add ours to the host's, before it starts to serve."""

    @routes.get("/svdquant/model")
    async def model(request: web.Request) -> web.Response:
        """``?name=``: :func:`badge` of a file, damaged ones included; 404 for anything that is not a model's name."""
        try:
            answer = await asyncio.to_thread(badge, request.query.get("name", ""))
        except LookupError as error:
            return web.json_response({"error": str(error.args[0])}, status=404)
        return web.json_response(answer)
