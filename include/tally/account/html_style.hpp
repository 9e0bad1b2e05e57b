// SPDX-License-Identifier: Apache-2.0
// How the HTML report looks: its style sheet, for light and dark screens, narrow ones and paper, and the little script that
// sorts tables and reads out what is pointed at. The page is complete without the script.
#pragma once

#include <string_view>

namespace tally::inline v0 {
namespace detail {

// Colours: Okabe and Ito's, which differ for colour-blind people as well, with the grays set apart by lightness.
inline constexpr std::string_view html_style = R"css(
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--muted:#57606a;--line:#d5dae1;--panel:#f5f7f9;--accent:#b34700;
--busy:#0072b2;--arrival:#d55e00;--transfer:#e69f00;--credit:#cc79a7;--local:#3d444d;--undriven:#c4cad1;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--bg:#0f1318;--fg:#e6eaef;--muted:#a3adb8;--line:#333b45;--panel:#181e25;--accent:#ff9a5c;
--busy:#4aa8e0;--arrival:#f0703a;--transfer:#f2c14e;--credit:#dd8fbf;--local:#c9d1d9;--undriven:#46505c;--bad:#ff8a80}}
@media print{:root{color-scheme:light;--bg:#fff;--fg:#000;--muted:#444;--line:#bbb;--panel:#f5f5f5;--accent:#8a3600;
--busy:#0072b2;--arrival:#d55e00;--transfer:#e69f00;--credit:#cc79a7;--local:#3d444d;--undriven:#c4cad1;--bad:#900}
nav,.js{display:none!important}section{break-inside:auto}figure,.card,.bars,tr{break-inside:avoid}body{font-size:10pt}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans","DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main,header{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:18px;color:var(--muted);font-size:15px}
h1{font-size:17px;font-weight:600;color:var(--fg);margin:0;overflow-wrap:anywhere}
h2{font-size:21px;line-height:1.25;margin:0 0 4px}
h3{font-size:16px;margin:22px 0 6px}
p{margin:0 0 10px;max-width:82ch}
nav{margin:6px 0 0}nav a{color:var(--muted);margin-right:14px;white-space:nowrap;display:inline-block;padding:2px 0}
a{color:var(--accent)}
section{margin:44px 0 0}
.lead{color:var(--muted);margin-bottom:14px}
#verdict{margin-top:16px;padding:20px 24px;background:var(--panel);border-left:8px solid var(--arrival);border-radius:6px}
#verdict.calm{border-color:var(--busy)}
#verdict.open{border-color:var(--undriven)}#verdict[data-finding=transfer]{border-color:var(--transfer)}#verdict[data-finding=credit]{border-color:var(--credit)}#verdict[data-finding=local]{border-color:var(--local)}
#verdict .headline{font-size:clamp(26px,4.4vw,40px);line-height:1.15;font-weight:700;letter-spacing:-.01em;margin:0 0 10px;max-width:none}
#verdict .detail{font-size:clamp(17px,2.1vw,21px);line-height:1.4;margin:0;max-width:66ch}
#verdict ul{margin:14px 0 0;padding-left:20px;color:var(--muted)}#verdict li{margin:3px 0;max-width:92ch}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:14px 0 0}
.card{border:1px solid var(--line);border-radius:6px;padding:12px 16px}
.card dt{color:var(--muted);font-size:14px}.card dd{margin:0}
.card .big{font-size:28px;line-height:1.25;font-weight:650;overflow-wrap:anywhere}.card .small{color:var(--muted);font-size:14px;line-height:1.4}
.bad{color:var(--bad);font-weight:600}
.unknown{color:var(--muted);font-style:italic}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 10px;padding:0;list-style:none;font-size:14px;color:var(--muted)}
.legend i{display:inline-block;width:14px;height:14px;border-radius:2px;margin-right:6px;vertical-align:-2px}
.legend i.blank{border:1px dashed var(--muted)}.legend i.none{background:var(--panel);border:1px solid var(--line)}.legend i.scale{width:120px;background:linear-gradient(90deg,transparent,var(--arrival));border:1px solid var(--line)}
.legend svg{display:inline-block;width:30px;height:10px;margin-right:6px}
.k-busy{background:var(--busy);fill:var(--busy)}.k-arrival{background:var(--arrival);fill:var(--arrival)}.k-transfer{background:var(--transfer);fill:var(--transfer)}
.k-credit{background:var(--credit);fill:var(--credit)}.k-local{background:var(--local);fill:var(--local)}.k-undriven{background:var(--undriven);fill:var(--undriven)}
.k-passed{background:repeating-linear-gradient(135deg,var(--arrival) 0 2px,transparent 2px 6px);outline:1px solid var(--arrival);outline-offset:-1px}
.bars+p{margin-top:12px}.part .name{padding-left:16px}
.bars{display:grid;grid-template-columns:minmax(90px,max-content) minmax(80px,1fr) max-content;gap:7px 14px;align-items:center;margin:0;padding:0}
.bars.wide{grid-template-columns:minmax(90px,max-content) minmax(80px,1fr) minmax(190px,max-content)}
.row{display:contents}
.name{overflow-wrap:anywhere;line-height:1.25}.name small,.value small{color:var(--muted);font-size:13px;display:block}
.value{font-size:15px;line-height:1.25}
.track{position:relative;height:18px;background:var(--panel);display:flex;border-radius:2px}
.track.thin{height:8px;margin:2px 0}
.track b{display:block;height:100%;min-width:1px}
.track .err{position:absolute;top:50%;height:0;border-top:2px solid var(--fg);pointer-events:none}
.track .err::before,.track .err::after{content:"";position:absolute;top:-6px;height:10px;border-left:2px solid var(--fg)}
.track .err::before{left:0}.track .err::after{right:0}
figure{margin:0}
.scroll{overflow-x:auto;max-width:100%}
.scroll:focus-visible,summary:focus-visible,a:focus-visible,button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
svg.chart{display:block;width:100%;height:auto;font-size:12px}
svg.wide{min-width:720px}
svg text{fill:var(--fg)}svg .m{fill:var(--muted)}svg .r{text-anchor:end}svg .c{text-anchor:middle}svg .s{font-weight:700;fill:var(--accent)}
svg .grid{stroke:var(--line);stroke-width:1}svg .lane{fill:var(--panel)}svg .self{fill:var(--line)}
svg .cell{fill:var(--arrival)}svg .frame{fill:var(--panel)}svg .v{text-anchor:middle;font-size:11px;paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round;pointer-events:none}svg .on{fill:#000;stroke:none;font-weight:600}
svg .arrow{stroke:var(--fg);stroke-width:1.1;fill:none;opacity:.8}svg .head{fill:var(--fg)}
svg .call:hover rect,svg .cell:hover{stroke:var(--fg);stroke-width:1}
svg .line{fill:none;stroke-width:2}
.q0{stroke:var(--busy)}.q1{stroke:var(--arrival)}.q2{stroke:var(--transfer)}.q3{stroke:var(--credit)}.q4{stroke:var(--local)}.q5{stroke:#009e73}.q6{stroke:#56b4e9}.q7{stroke:var(--muted)}
.readout{min-height:1.5em;margin:6px 0 0;font-size:15px;color:var(--muted)}
table{border-collapse:collapse;font-size:14px}.scroll+p{margin-top:8px}
th,td{padding:5px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--muted);font-weight:600;vertical-align:bottom}th{white-space:normal}td.l,th.l{text-align:left}td small{color:var(--muted);font-size:12px;display:block}td.w{white-space:normal;min-width:16ch}
tbody tr:hover{background:var(--panel)}tr.hot td{font-weight:700}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer}th[aria-sort] button{color:var(--fg)}
th[aria-sort=ascending] button::after{content:" \25B2"}th[aria-sort=descending] button::after{content:" \25BC"}
details{margin-top:14px}summary{cursor:pointer;color:var(--accent)}
.notes li{margin:6px 0;max-width:90ch;overflow-wrap:anywhere}
dl.glossary{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;max-width:100ch}dl.glossary dt{font-weight:600}dl.glossary dd{margin:0}
footer{max-width:1240px;margin:44px auto 0;padding:14px 20px 40px;color:var(--muted);font-size:14px}
@media (max-width:640px){body{font-size:15px}main,header,footer{padding-left:14px;padding-right:14px}#verdict{padding:16px}
.bars,.bars.wide{grid-template-columns:minmax(64px,max-content) 1fr}.bars .value{grid-column:1/-1;margin:-6px 0 6px}.bars .name{grid-column:1}
dl.glossary{grid-template-columns:1fr}dl.glossary dd{margin-bottom:6px}}
)css";

// Sorts a table by the column whose head is pressed, and reads out the title of what is pointed at or touched.
inline constexpr std::string_view html_script = R"js(
'use strict';
window.onerror=function(m){document.documentElement.dataset.error=m};
document.querySelectorAll('table.sortable').forEach(function(t){
 var body=t.tBodies[0];
 t.querySelectorAll('thead th').forEach(function(h,i){
  var b=document.createElement('button');b.type='button';while(h.firstChild)b.appendChild(h.firstChild);h.appendChild(b);
  b.addEventListener('click',function(){
   var up=h.getAttribute('aria-sort')==='descending';
   t.querySelectorAll('th').forEach(function(o){o.removeAttribute('aria-sort')});
   h.setAttribute('aria-sort',up?'ascending':'descending');
   Array.from(body.rows).map(function(r){var c=r.cells[i];return [c.hasAttribute('data-v')?(c.dataset.v===''?null:+c.dataset.v):c.textContent,r]})
    .sort(function(x,y){if(x[0]===null||y[0]===null)return (x[0]===null)-(y[0]===null);var d=typeof x[0]==='number'?x[0]-y[0]:x[0].localeCompare(y[0]);return up?d:-d})
    .forEach(function(p){body.appendChild(p[1])});
  });
 });
});
document.querySelectorAll('figure').forEach(function(f){
 var out=f.querySelector('.readout');if(!out)return;
 function tell(e){var n=e.target.closest('.call,.cell,.col');if(n&&n.querySelector('title'))out.textContent=n.querySelector('title').textContent}
 f.addEventListener('pointerover',tell);f.addEventListener('click',tell);
});
document.querySelectorAll('.js').forEach(function(n){n.hidden=false});
document.documentElement.dataset.js='ok';
)js";

}  // namespace detail
}  // namespace tally::inline v0
